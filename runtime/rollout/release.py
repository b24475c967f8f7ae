"""The files of a version in a repository: put in beside the old ones, taken out, or made the model's own.

What a server loads is pinned in every ``config.pbtxt``, so that a server which restarts in the middle of a
rollout serves the old version, and not whatever lies there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.plan_checks import require_plan_of_tower
from runtime.errors import ManifestError
from runtime.fingerprints import remark_on_models
from runtime.manifest import (
    FRONT_END_FILE,
    FileRecord,
    FrontEnds,
    KeptVersion,
    Manifest,
    Modality,
    TowerFiles,
    Variant,
    front_end_name,
    record_of_file,
    tower_folder_name,
    verify_file,
)
from runtime.storage import copy_folder
from runtime.triton_config import CONFIG_FILE, served_version, versions_of_folder, write_config_from

__all__ = ["Release", "release_from_model"]


@dataclass(frozen=True, slots=True)
class Release:
    """A version of REPOSITORY/NAME that is being put in.

    Attributes:
        source: The model it is taken from.
        key: Its variant, which is the key of both manifests.
        version: Its number.
        served: The version of the front ends that is served until then.
    """

    repository: Path
    manifest: Manifest
    source: Path
    candidate: Manifest
    key: str
    version: int
    served: int

    @property
    def trial_name(self) -> str:
        """Under this name it is asked the probes, before anybody else reaches it."""
        return f"{self.manifest.name}_candidate"

    @property
    def variant(self) -> Variant:
        """As the candidate's manifest has it."""
        return self.candidate.variants[self.key]

    @property
    def origin(self) -> str:
        """For messages."""
        return f"from {self.source}"

    def tower_folder(self, modality: Modality) -> Path:
        """Where its tower goes."""
        return self.repository / tower_folder_name(self.manifest.name, modality, self.key)

    def tower_version(self, modality: Modality) -> int:
        """The version of its tower, which is its own."""
        return self.version

    def front_end_folder(self, modality: Modality, *, trial: bool = False) -> Path:
        """Where its front end goes."""
        name = self.trial_name if trial else self.manifest.name
        return self.repository / front_end_name(name, modality)

    def folders(self) -> tuple[Path, ...]:
        """All folders of the model that it touches."""
        return tuple(
            folder
            for modality in Modality
            for folder in (self.tower_folder(modality), self.front_end_folder(modality))
        )

    def verify(self) -> None:
        """Compare the version's files, where they are, with their checksums.

        Raises:
            ManifestError: a file is missing, cut short or changed.
            EngineError: a plan was built from another graph.
        """
        repository = self.source.parent
        self.candidate.verify(repository, self.variant)
        self.candidate.verify_front_ends(repository)
        self._verify_plans(repository)

    def _verify_plans(self, repository: Path) -> None:
        if "tensorrt" in self.variant.engines:
            for modality in Modality:
                require_plan_of_tower(repository, self.variant.tower(modality))

    def verify_copies(self) -> None:
        """Compare what was copied of both towers' version with the checksums of what it was copied from.

        Raises:
            ManifestError: a copy is cut short or damaged.
        """
        for modality in Modality:
            tower, folder = self.variant.tower(modality), self.tower_folder(modality)
            origin = f"{tower.model}/{tower.version}/"
            for record in tower.files:
                if record.path.startswith(origin):
                    path = f"{folder.name}/{self.version}/{record.path.removeprefix(origin)}"
                    verify_file(self.repository, dataclasses.replace(record, path=path))

    def put_towers_in(self) -> None:
        """Copy both towers in, beside those that are served."""
        for modality in Modality:
            tower = self.variant.tower(modality)
            origin = self.source.parent / tower.model
            folder = self.tower_folder(modality)
            if not folder.exists():
                folder.mkdir()
                write_config_from(origin, folder, versions=[self.version])
            for file in _own_files(origin):
                target = folder / file.relative_to(origin)
                if file.name != CONFIG_FILE and not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)
            copy_folder(origin / str(tower.version), folder / str(self.version))

    def put_front_end_in(self, modality: Modality, *, trial: bool) -> None:
        """Copy a front end in, bound to the towers' version, and make it the one to be loaded."""
        origin = self.source.parent / front_end_name(self.candidate.name, modality)
        folder = self.front_end_folder(modality, trial=trial)
        folder.mkdir(exist_ok=True)
        copy_folder(
            origin / str(served_version(origin)), folder / str(self.version), adapt=self._bind(modality)
        )
        self._write_front_end_config(folder, origin, modality, trial=trial)

    def _write_front_end_config(self, folder: Path, origin: Path, modality: Modality, *, trial: bool) -> None:
        parameters = {
            "babeltower_name": self.trial_name if trial else self.manifest.name,
            "babeltower_tower": self.tower_folder(modality).name,
        }
        write_config_from(
            origin,
            folder,
            versions=[self.version],
            parameters={**parameters, **self.front_end_facts(modality)},
        )

    def front_end_facts(self, modality: Modality) -> dict[str, str]:
        """What a front end's configuration says of this version, beyond what its origin's says."""
        return {}

    def _bind(self, modality: Modality) -> Any:
        def bound(version_folder: Path) -> None:
            path = version_folder / FRONT_END_FILE
            spec = json.loads(path.read_text(encoding="utf-8"))
            spec["tower"] |= {"model": self.tower_folder(modality).name, "version": self.version}
            path.write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

        return bound

    def pin(self, folder: Path, versions: Sequence[int]) -> None:
        """Say which versions of a folder are to be loaded."""
        write_config_from(folder, folder, versions=versions)

    def take_out(self, *, trial_only: bool) -> None:
        """Remove what was put in; the trial's front ends are removed in any case."""
        for modality in Modality:
            shutil.rmtree(self.front_end_folder(modality, trial=True), ignore_errors=True)
        if not trial_only:
            for folder in self.folders():
                shutil.rmtree(folder / str(self.version), ignore_errors=True)
                if folder.exists() and not versions_of_folder(folder):
                    shutil.rmtree(folder)

    def finished_manifest(self) -> Manifest:
        """The model's manifest once this version is the one that is served."""
        towers = {modality: self._tower_files(modality) for modality in Modality}
        text = towers[Modality.TEXT]
        tokenizer = f"{text.model}/{Path(self.variant.tokenizer).name}"
        variant = dataclasses.replace(
            self.variant, text=text, image=towers[Modality.IMAGE], tokenizer=tokenizer
        )
        text_name, image_name = (self.front_end_folder(m).name for m in (Modality.TEXT, Modality.IMAGE))
        records = [
            record
            for name in (text_name, image_name)
            for record in _records(self.repository, self.repository / name, self.version)
        ]
        return dataclasses.replace(
            self.manifest,
            variants={**self.manifest.variants, self.key: variant},
            front_ends=(FrontEnds(self.key, text_name, image_name, tuple(records)),),
            kept=self._kept(),
        )

    def _kept(self) -> tuple[KeptVersion, ...]:
        """Versions to go back to: those of before, and the one that was served until now."""
        (front_ends,) = self.manifest.front_ends
        key = front_ends.variant
        served = KeptVersion(self.served, key, self.manifest.variants[key])
        others = [kept for kept in self.manifest.kept if kept.version not in (self.version, served.version)]
        return (*others, served)

    def _tower_files(self, modality: Modality) -> TowerFiles:
        folder = self.tower_folder(modality)
        return dataclasses.replace(
            self.variant.tower(modality),
            model=folder.name,
            version=self.tower_version(modality),
            files=tuple(_records(self.repository, folder, self.tower_version(modality))),
        )


def release_from_model(model: Path, source: Path, key: str | None = None) -> Release:
    """Plan a version; nothing is written.

    Raises:
        ManifestError: another embedding space, a variant that is not there, or missing front ends.
    """
    manifest, candidate = Manifest.read(model), Manifest.read(source)
    if manifest.fingerprint != candidate.fingerprint:
        raise ManifestError(
            f"{source} embeds into the space {candidate.fingerprint!r}, {model} into "
            f"{manifest.fingerprint!r}. Its vectors could not be compared with those that were made so far: "
            "serve it under a name of its own, and embed everything again."
            + remark_on_models(candidate.fingerprint, manifest.fingerprint)
        )
    if key is None and len(candidate.variants) > 1:
        raise ManifestError(f"{source} holds {sorted(candidate.variants)}; pass --variant.")
    key = key or next(iter(candidate.variants))
    if key not in candidate.variants:
        raise ManifestError(f"{source} has no variant {key!r}; it holds {sorted(candidate.variants)}.")
    release = Release(model.parent, manifest, source, candidate, key, version=0, served=0)
    for parent, name in ((model.parent, manifest.name), (source.parent, candidate.name)):
        for modality in Modality:
            folder = parent / front_end_name(name, modality)
            if not (folder / CONFIG_FILE).is_file() or not versions_of_folder(folder):
                raise ManifestError(f"{folder} is missing or no front end. Write the front ends first.")
    if not manifest.front_ends:
        raise ManifestError(f"{model} is served by no front ends. Run: babeltower frontends {model}")
    taken = [v for folder in release.folders() if folder.exists() for v in versions_of_folder(folder)]
    served = served_version(release.front_end_folder(Modality.TEXT))
    return dataclasses.replace(release, version=max(taken) + 1, served=served)


def _records(repository: Path, folder: Path, version: int) -> list[FileRecord]:
    graph = [path for path in (folder / str(version)).rglob("*") if path.is_file()]
    return [record_of_file(repository, path) for path in sorted([*_own_files(folder), *graph])]


def _own_files(folder: Path) -> list[Path]:
    """What a Triton model has beside its versions: its configuration, a tokenizer, tensors to warm it up."""
    tops = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.name.isdecimal()]
    return [file for top in tops for file in ([top] if top.is_file() else top.rglob("*")) if file.is_file()]
