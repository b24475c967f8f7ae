"""Opening checks of a model: the probes of each tower, and the cache of passed checks."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.backend import Backend
from runtime.device import Device
from runtime.errors import ManifestError
from runtime.logs import LOGGER
from runtime.manifest import GPU_ENGINES, Engine, FileRecord, Manifest, Modality, TowerFiles, Variant
from runtime.opening.cache import PassCache, kernel_facts
from runtime.opening.probes import OPENING_FILE, OpeningProbes, space_of_manifest
from runtime.opening.tower_check import engine_version, others_in_words, require_opening
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.preprocessing.text import Tokenizer, texts_with_languages
from runtime.probes import Probes, opening_images, opening_texts, probes_path, token_runs
from runtime.storage import sha256_of_file

__all__ = ["OpeningCheck", "opening_path", "probes_of_tower", "require_same_space"]

_OLD = (
    " The model's export recorded no figures per probe, so the lowest cosine that it measured, or the limit "
    "that it was exported with, applies to every probe."
)


def opening_path(repository: Path, tower: TowerFiles) -> Path:
    """Return the path of a tower's opening probes."""
    return repository / tower.model / str(tower.version) / OPENING_FILE


def has_opening_file(tower: TowerFiles) -> bool:
    """Check whether the manifest lists a tower's opening probes; older exports have none."""
    return any(record.path == f"{tower.model}/{tower.version}/{OPENING_FILE}" for record in tower.files)


def probes_of_tower(
    repository: Path, manifest: Manifest, variant: Variant, modality: Modality
) -> OpeningProbes | None:
    """Return a tower's opening probes: its own file, or a selection of NAME.probes.npz for older exports.

    Returns:
        ``None`` if the model has no probes, or no figures to compare them with.

    Raises:
        ManifestError: a file of the manifest is missing or damaged.
    """
    tower = variant.tower(modality)
    if has_opening_file(tower):
        return OpeningProbes.read(opening_path(repository, tower))
    model = repository / manifest.name
    if not manifest.probes and not probes_path(model).is_file():
        return None
    least = {
        engine: figure
        for engine in variant.engines
        if (figure := _least_figure(variant, modality, engine)) is not None
    }
    if not least:
        return None
    probes = Probes.read(model, manifest.probes[0] if manifest.probes else None)
    if probes.fingerprint != manifest.fingerprint:
        raise ManifestError(
            f"{probes_path(model)} is of space {probes.fingerprint!r}, but {manifest.name} is of "
            f"{manifest.fingerprint!r}. Copy the repository again, or export the checkpoint again."
        )
    chosen = _chosen(repository, manifest, variant, modality, probes)
    name = tower.outputs[str(manifest.dim)]
    figures = {engine: {name: (figure,) * chosen.n_rows} for engine, figure in least.items()}
    return dataclasses.replace(chosen, figures=figures, measured_on=variant.measured_on)


def _least_figure(variant: Variant, modality: Modality, engine: str) -> float | None:
    """Return the lowest cosine that the export measured for a tower, otherwise the limit it was held to."""
    try:
        engines = {name.partition(" ")[0]: found for name, found in variant.parity["engines"].items()}
        return float(engines[engine][modality.value]["min_cosine"])
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    try:
        return float(variant.parity["limits"]["min_cosine"])
    except (KeyError, TypeError, ValueError):
        return None


def _chosen(
    repository: Path, manifest: Manifest, variant: Variant, modality: Modality, probes: Probes
) -> OpeningProbes:
    name = variant.tower(modality).outputs[str(manifest.dim)]
    if modality is Modality.IMAGE:
        rows = opening_images(probes.image_vectors)
        images = tuple(probes.images[row] for row in rows)
        pixels = np.stack([pixels_from_image(decode(image), manifest.image) for image in images])
        vectors = {name: probes.image_vectors[rows]}
        return OpeningProbes(modality, ({"pixels": pixels},), vectors, images=images)
    tokenizer = Tokenizer(repository / variant.tokenizer, manifest.text)
    ids = [r.ids for r in tokenizer.rows_from_texts([*texts_with_languages(probes.texts, probes.languages)])]
    rows = opening_texts(probes.texts, probes.languages, [len(row) for row in ids], probes.text_vectors)
    return OpeningProbes(
        modality,
        token_runs([ids[row] for row in rows], manifest.text),
        {name: probes.text_vectors[rows]},
        texts=tuple(probes.texts[row] for row in rows),
        languages=tuple(probes.languages[row] for row in rows),
    )


def require_same_space(
    repository: Path, manifest: Manifest, variant: Variant, modality: Modality, probes: OpeningProbes
) -> None:
    """Check that the manifest's fingerprint and preprocessing are those the tower was exported with.

    Older probes do not record them, and pass.

    Raises:
        ManifestError: the manifest was changed after the export.
    """
    if not probes.space:
        return
    found, exported = _space(manifest, modality), probes.space
    ours, theirs = found["preprocessing"], exported.get("preprocessing", {})
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if found["fingerprint"] != exported.get("fingerprint"):
        differing.insert(0, "fingerprint")
    if differing:
        raise ManifestError(
            f"The manifest of {repository / manifest.name} differs in {', '.join(differing)} "
            f"({modality.value}) from the export of {variant.tower(modality).model}: it was changed "
            "after the export. Copy the repository again, or export the checkpoint again."
        )


def _space(manifest: Manifest, modality: Modality) -> dict[str, Any]:
    preprocessing = manifest.text if modality is Modality.TEXT else manifest.image
    return space_of_manifest(manifest.fingerprint, preprocessing)


@dataclass(frozen=True, slots=True)
class OpeningCheck:
    """Opening check of a model's towers, each run once for the same files, engine and machine.

    Attributes:
        threads, provider, device: Options that the backend was opened with.
        cache: Earlier passes. Towers on a GPU are checked at every opening, which takes milliseconds.
    """

    repository: Path
    manifest: Manifest
    variant: Variant
    engine: Engine
    threads: int | None
    provider: str | None
    cache: PassCache
    device: Device | None = None

    def require(self, modality: Modality, backend: Backend) -> None:
        """Check a tower that was just opened.

        Raises:
            OpeningCheckError: its vectors differ from PyTorch's.
            ManifestError: its probes are missing, damaged, or have no figures of this engine.
            EngineError: it does not run.
        """
        facts = self._facts(modality)
        if facts is not None and self.cache.has(facts):
            return
        probes = probes_of_tower(self.repository, self.manifest, self.variant, modality)
        if probes is None:
            LOGGER.warning(
                "%s has no probes with PyTorch's vectors, so its %s tower cannot be checked on this machine. "
                "Export the checkpoint again.",
                self.repository / self.manifest.name,
                modality.value,
            )
            return
        require_same_space(self.repository, self.manifest, self.variant, modality, probes)
        precision = self.variant.precision
        tower = self.variant.tower(modality)
        require_opening(
            backend,
            probes,
            tower=tower.model,
            engine=self.engine,
            precision=precision,
            others=others_in_words(self.manifest, self.engine, precision),
            note="" if has_opening_file(tower) else _OLD,
            gpu=0 if self.device is None else self.device.gpu or 0,
        )
        if facts is not None:
            self.cache.add(facts)

    def _facts(self, modality: Modality) -> dict[str, Any] | None:
        """Return all facts that a pass depends on; ``None`` if unknown, as on a GPU."""
        if self.engine in GPU_ENGINES or "CPU" not in (self.provider or "CPU"):
            return None
        tower = self.variant.tower(modality)
        folder = f"{tower.model}/{tower.version}/"
        records: tuple[FileRecord, ...] = tuple(r for r in tower.files if r.path.startswith(folder))
        probes = ""
        if not has_opening_file(tower):
            path = probes_path(self.repository / self.manifest.name)
            if not path.is_file():
                return None
            probes = sha256_of_file(path)
        return {
            "format": "babeltower-pass/2",
            "space": _space(self.manifest, modality),
            "files": {record.path.rpartition("/")[2]: record.sha256 for record in records},
            "probes": probes,
            "figure": None if has_opening_file(tower) else self._least(modality),
            "engine": self.engine.value,
            "engine_version": engine_version(self.engine),
            "precision": self.variant.precision.value,
            "provider": self.provider,
            "threads": self.threads,
            "system": f"{platform.system()} {platform.machine()}",
            **kernel_facts(),
        }

    def _least(self, modality: Modality) -> float | None:
        return _least_figure(self.variant, modality, self.engine.value)
