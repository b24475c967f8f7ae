"""Export a checkpoint to a Triton model repository: write to staging, check parity, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.checkpoint import towers_from_checkpoint
from export.kept_variants import Kept, kept_variants
from export.onnx_graph import onnx_from_tower
from export.parity.expectations import Expectations, expected_of_reference
from export.parity.gate import GateReference, gate_reference
from export.parity.limits import limits_of
from export.parity.measure import ParityReport, measure_parity
from export.parity.probe_set import probes_from_expected, with_opening_probes
from export.precision.calibration import CalibrationSet, CalibrationSize, calibration_from_path
from export.precision.int8 import Int8Recipe
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import Progress
from export.towers import Towers
from export.triton.frontends import frontends_from_model
from export.triton.tower_folders import tower_metadata, write_tower
from export.variants import FP32, Form
from export.vocabulary.loss import vocabulary_loss
from export.vocabulary.pruned_towers import pruned_towers
from export.vocabulary.selection import VocabularyOptions
from runtime.backends import is_installed
from runtime.backends.cuda import gpu_record
from runtime.backends.onnxruntime_build import CUDA_PROVIDER
from runtime.errors import ExportError, ManifestError, ParityError
from runtime.machine import machine_facts
from runtime.manifest import (
    GPU_ENGINES,
    TOKENIZER_FILE,
    Engine,
    Manifest,
    Modality,
    Precision,
    Variant,
    manifest_path,
    record_of_file,
    require_name,
    tower_folder_name,
)
from runtime.preprocessing.text import Tokenizer
from runtime.probes import probes_path
from runtime.repository import publish, remove_unlisted, staging

__all__ = [
    "Draft",
    "Export",
    "ExportOptions",
    "drafted",
    "installed_engines",
    "name_of_checkpoint",
    "repository_for_timing",
    "repository_from_checkpoint",
    "repository_from_towers",
    "require_free",
]

_N_WORST_KEPT = 20
_REPORTED = (
    "babeltower",
    "torch",
    "transformers",
    "open_clip_torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tokenizers",
    "numpy",
)


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Ignore progress reports."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Export settings.

    Attributes:
        forms: Variants to export; if empty, FP32 for all installed engines.
        replace: Allow existing variants to be replaced.
        texts_per_language: Probe texts per language, eight at most.
        captions_per_language: Query captions per language for the retrieval gate, sampled with a fixed
            seed; None for all. 0 skips retrieval, which is allowed for FP32 only, as its vectors must
            agree to 1e-5.
        retrieval_set: Retrieval set of the gate; the project's samples if None.
        calibration: Parquet file or image folder; the samples' training split if None.
        calibration_size: Number of calibration texts and images, and the random seed.
        recipes: Quantization recipe by tower; the engine's default where missing.
        reference: PyTorch's results on the retrieval set, if already measured.
        accept_drop: Recall drop, as a share, to accept beyond a precision's own limits; recorded.
        vocabulary: Languages to keep of the vocabulary; None for all.
        threads: Threads per run; None uses all cores.
    """

    forms: tuple[Form, ...] = ()
    replace: bool = False
    texts_per_language: int = 4
    captions_per_language: int | None = 200
    retrieval_set: RetrievalSet | None = None
    calibration: Path | None = None
    calibration_size: CalibrationSize = field(default_factory=CalibrationSize)
    recipes: Mapping[Modality, Int8Recipe] = field(default_factory=dict)
    reference: GateReference | None = None
    accept_drop: float | None = None
    vocabulary: VocabularyOptions | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        lower = [form.key for form in self.forms if form.precision is not Precision.FP32]
        if self.captions_per_language == 0 and lower:
            raise ExportError(
                f"{lower[0]} needs a retrieval check, which captions_per_language=0 disables; pass 1 or more."
            )
        if self.accept_drop is not None and not 0 < self.accept_drop < 1:
            raise ExportError(f"accept_drop {self.accept_drop} is out of range; expected a share, 0 to 1.")


@dataclass(frozen=True, slots=True)
class Export:
    """Published model: path, manifest, parity by variant, and seconds by step.

    ``dropped`` gives the removed variants of an earlier export, which are not proven to have the same
    embedding space, each with the reason.
    """

    model: Path
    manifest: Manifest
    parity: Mapping[str, ParityReport]
    seconds: Mapping[str, float]
    dropped: Mapping[str, str] = field(default_factory=dict)


def repository_from_checkpoint(
    checkpoint: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    context_length: int | None = None,
    image_tower: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress = _silent,
) -> Export:
    """Export both towers, check parity with PyTorch and publish REPOSITORY/NAME.

    The repository is changed only by renames, after all checks, so it is never half-written.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        name: Name of the model; the checkpoint's name by default.
        base: Base checkpoint of a LoRA adapter.
        context_length: Maximum text length in tokens; the family's own by default.
        image_tower: See ``towers_from_checkpoint``.

    Raises:
        CheckpointError: the checkpoint cannot be read exactly.
        ExportError: the name is taken, the disk is full, or a graph could not be written.
        ParityError: a variant does not agree with PyTorch. It is not published, and its report is written to
            ``REPOSITORY/NAME.VARIANT.refused.json``; the other variants are published.
    """
    name = name or name_of_checkpoint(checkpoint)
    options = _with_forms(options or ExportOptions())
    require_free(Path(repository), name, options)
    started = time.perf_counter()
    towers = towers_from_checkpoint(
        checkpoint, base=base, context_length=context_length, image_tower=image_tower
    )
    towers = dataclasses.replace(towers, source={"checkpoint": Path(str(checkpoint)).name, **towers.source})
    loaded = time.perf_counter() - started
    export = repository_from_towers(towers, repository, name=name, options=options, progress=progress)
    return dataclasses.replace(export, seconds={"load": loaded, **export.seconds})


def repository_from_towers(
    towers: Towers,
    repository: str | Path,
    *,
    name: str,
    options: ExportOptions | None = None,
    progress: Progress = _silent,
) -> Export:
    """Export and publish loaded towers; see ``repository_from_checkpoint``."""
    repository, options = Path(repository), _with_forms(options or ExportOptions())
    require_free(repository, name, options)
    if options.vocabulary is not None:
        towers = pruned_towers(towers, options.vocabulary)
    with staging(repository, "export") as stage:
        published = _published(repository, name, replace=options.replace)
        _require_same_vocabulary(published, towers, repository, options)
        return _Run(towers, repository, name, options, progress, stage, published).export()


def repository_for_timing(towers: Towers, repository: Path, *, name: str, form: Form) -> Path:
    """Write a model of random weights for timing: parity is not measured, and its manifest says so.

    Returns:
        ``REPOSITORY/NAME``, with front ends.

    Raises:
        ExportError: the disk is full, or a graph could not be written.
    """
    with staging(repository, "export") as stage:
        run = _Run(towers, repository, name, ExportOptions(forms=(form,)), _silent, stage, None)
        draft = run.draft(form, dict(run.sources()), run.calibration())
        variant = dataclasses.replace(draft, parity={"measured": "nothing: the weights are random"})
        publish(stage, repository, run.manifest({form.key: variant}), variant)
    frontends_from_model(repository / name)
    return repository / name


@dataclass(frozen=True, slots=True)
class Draft:
    """One variant in a staging folder, not yet measured, and what it is to be measured against.

    Attributes:
        expected: PyTorch's results for the probes; None if nothing is to be measured.
        gate: PyTorch's results for the retrieval set; None if retrieval is to be skipped.
    """

    stage: Path
    variant: Variant
    manifest: Manifest
    expected: Expectations | None
    gate: GateReference | None
    seconds: Mapping[str, float]

    def graph(self, modality: Modality) -> Path:
        """Return the path of a tower's graph."""
        tower = self.variant.tower(modality)
        return self.stage / tower.model / str(tower.version) / tower.graph


@contextlib.contextmanager
def drafted(
    towers: Towers,
    folder: Path,
    *,
    name: str,
    options: ExportOptions,
    progress: Progress = _silent,
    measured: bool = True,
) -> Iterator[Draft]:
    """Write one variant to a staging folder beside ``folder``; removed at the end.

    Args:
        options: Settings; the first form is written.
        measured: Compute PyTorch's results for the probes and the retrieval set.

    Raises:
        EngineError: the variant cannot be built or measured on this machine.
        ExportError: the disk is full, or a graph could not be written.
    """
    form = options.forms[0]
    form.require_here()
    with staging(folder, "export") as stage:
        run = _Run(towers, folder, name, options, progress, stage, None)
        expected, gate = run.reference() if measured else (None, None)
        run.needing = run._needing(gate)
        variant = run.draft(form, dict(run.sources()), run.calibration())
        yield Draft(stage, variant, run.manifest({form.key: variant}), expected, gate, run.seconds)


@dataclass(slots=True)
class _Run:
    """State of one export; data shared by its variants is computed once."""

    towers: Towers
    repository: Path
    name: str
    options: ExportOptions
    progress: Progress
    stage: Path
    published: Manifest | None
    kept: Kept = field(default_factory=Kept)
    needing: Mapping[str, Any] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def export(self) -> Export:
        sources = dict(self.sources())
        calibration = self.calibration()
        expected, gate = self.reference()
        self.needing = self._needing(gate)
        with self._timed("kept variants"):
            self.kept = kept_variants(self.published, self.repository, self.towers, expected)
        self.variants = dict(self.kept.variants)
        reports: dict[str, ParityReport] = {}
        refused: dict[str, ParityReport] = {}
        dropped: Mapping[str, str] = {}
        try:
            for form in self.options.forms:
                report = self._variant(form, sources, calibration, expected, gate)
                (refused if report.violations() else reports)[form.key] = report
        finally:  # complete the published variants even if a later one fails
            if reports:
                with self._timed("front ends"):
                    self._front_ends(first=next(iter(reports)))
                dropped = self._dropped()
        if refused:
            raise ParityError(self._refusal(refused, published=list(reports), dropped=dropped))
        return Export(
            self.repository / self.name,
            Manifest.read(self.repository / self.name),
            reports,
            self.seconds,
            dropped,
        )

    def _dropped(self) -> dict[str, str]:
        """Remove unlisted towers; return the reason by variant, or by folder if it belongs to no variant."""
        removed = remove_unlisted(self.stage, self.repository, Manifest.read(self.repository / self.name))
        dropped = {key: why for key, why in self.kept.dropped.items() if key not in self.variants}
        known = {tower_folder_name(self.name, modality, key) for key in dropped for modality in Modality}
        return {**dropped, **{name: "no manifest lists it" for name in removed if name not in known}}

    def _front_ends(self, *, first: str) -> None:
        """Rewrite the front ends for the variant served before, or else FP32, or else the first one.

        A lower precision is served only on request: ``babeltower frontends --variant``.
        """
        served = [front_ends.variant for front_ends in self.published.front_ends] if self.published else []
        variants = Manifest.read(self.repository / self.name).variants
        kept = [key for key in (*served, FP32.key) if key in variants]
        variant = kept[0] if kept else first
        frontends_from_model(self.repository / self.name, variant=variant)

    def sources(self) -> Iterator[tuple[Modality, Path]]:
        """Export the FP32 graphs, the source of all variants."""
        for modality in Modality:
            folder = tower_folder_name(self.name, modality, FP32.key)
            graph = self.stage / "sources" / folder / "model.onnx"
            graph.parent.mkdir(parents=True)
            with self._timed(f"{modality.value} graph"):
                onnx_from_tower(
                    self.towers,
                    modality,
                    graph,
                    data_name=f"{folder}.data",
                    metadata=tower_metadata(self.towers, self.name, modality),
                )
            yield modality, graph

    def calibration(self) -> CalibrationSet | None:
        """The calibration set, where a form needs one."""
        if not any(form.needs_calibration for form in self.options.forms):
            return None
        towers = self.towers.whole  # also of a pruned vocabulary, so that INT8 gives equal vectors
        path = self.stage / "sources" / TOKENIZER_FILE
        path.write_text(towers.tokenizer_json, encoding="utf-8")
        with self._timed("calibration set"):
            return calibration_from_path(
                self.options.calibration,
                Tokenizer(path, towers.text_preprocessing),
                towers.text_preprocessing,
                towers.image_preprocessing,
                languages=towers.languages,
                size=self.options.calibration_size,
            )

    def reference(self) -> tuple[Expectations, GateReference | None]:
        """Compute PyTorch's results, for all variants."""
        with self._timed("PyTorch"):
            expected = expected_of_reference(self.towers, self.options.texts_per_language)
            return expected, self._gate()

    def _gate(self) -> GateReference | None:
        if self.options.captions_per_language == 0:
            return None
        if self.options.reference is not None:
            return self.options.reference
        return gate_reference(
            self.towers,
            self.options.retrieval_set or sample_retrieval_set(),
            captions_per_language=self.options.captions_per_language,
            progress=self.progress,
        )

    def _needing(self, gate: GateReference | None) -> Mapping[str, Any]:
        """Measure and check what a pruned vocabulary costs; empty for a whole one."""
        if self.towers.kept is None or gate is None:
            return {}
        loss = vocabulary_loss(self.towers, gate)
        loss.require_small(self.options.accept_drop)
        return loss.as_json()

    def _variant(
        self,
        form: Form,
        sources: Mapping[Modality, Path],
        calibration: CalibrationSet | None,
        expected: Expectations,
        gate: GateReference | None,
    ) -> ParityReport:
        """Write and measure one variant, and publish it if the limits hold."""
        with self._timed(f"{form.key} graphs"):
            draft = self.draft(form, sources, calibration)
        manifest_path(self.stage / self.name).write_text(
            self.manifest({form.key: draft}).to_json(), encoding="utf-8"
        )
        limits = limits_of(form.precision, form.opened_by[0])
        if self.options.accept_drop is not None:
            limits = limits.accepting(self.options.accept_drop)
        with self._timed(f"{form.key} parity"):
            report = measure_parity(
                self.towers,
                self.stage,
                self.manifest({form.key: draft}),
                form.precision,
                engines=form.opened_by,
                device=form.device,
                limits=limits,
                expected=expected,
                gate=gate,
                threads=self.options.threads,
                progress=_prefixed(self.progress, form.key),
            )
        if report.violations():
            for tower in (draft.text, draft.image):
                shutil.rmtree(self.stage / tower.model)
            return report
        with self._timed(f"{form.key} opening probes"):
            variant = with_opening_probes(
                dataclasses.replace(draft, parity=report.as_json()),
                expected,
                self.towers,
                self.stage,
                engines=form.opened_by,
                device=form.device,
            )
        self.variants[form.key] = variant
        probes = probes_path(self.stage / self.name)
        probes_from_expected(expected, self.towers).save(probes)
        manifest = dataclasses.replace(
            self.manifest(self.variants), probes=(record_of_file(self.stage, probes),)
        )
        publish(self.stage, self.repository, manifest, variant)
        return report

    def draft(
        self, form: Form, sources: Mapping[Modality, Path], calibration: CalibrationSet | None
    ) -> Variant:
        """Write both towers of a variant into the stage, not yet measured."""
        recipes, towers = {}, {}
        for modality in Modality:
            towers[modality], recipes[modality.value] = write_tower(
                self.towers,
                modality,
                self.stage,
                name=self.name,
                form=form,
                source=sources[modality],
                calibration=calibration,
                recipe=self.options.recipes.get(modality),
            )
        return Variant(
            precision=form.precision,
            engines=tuple(engine.value for engine in form.opened_by),
            text=towers[Modality.TEXT],
            image=towers[Modality.IMAGE],
            tokenizer=f"{towers[Modality.TEXT].model}/{TOKENIZER_FILE}",
            parity={},
            recipe={modality: how for modality, how in recipes.items() if how},
            calibration=calibration.as_json() if calibration and form.needs_calibration else {},
            versions=_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            measured_on=_measured_on(form),
        )

    def manifest(self, variants: Mapping[str, Variant]) -> Manifest:
        """The model's manifest with these variants."""
        towers = self.towers
        return Manifest(
            name=self.name,
            family=towers.family,
            architecture=towers.architecture,
            dim=towers.dim,
            mrl_dims=towers.mrl_dims,
            fingerprint=towers.fingerprint,
            licence=towers.licence,
            languages=towers.languages,
            text=towers.text_preprocessing,
            image=towers.image_preprocessing,
            source=towers.source,
            variants=variants,
            vocabulary=()
            if towers.kept is None
            else (dataclasses.replace(towers.kept.record, needing=self.needing),),
        )

    def _refusal(
        self, refused: Mapping[str, ParityReport], *, published: Sequence[str], dropped: Mapping[str, str]
    ) -> str:
        """Write the reports of refused variants and return the error message."""
        lines = []
        for key, report in refused.items():
            path = self.repository / f"{self.name}.{key}.refused.json"
            worst = report.worst_languages()
            record = {
                "violations": report.violations(),
                "worst_languages": report.worst_languages(_N_WORST_KEPT),
                **report.as_json(),
            }
            path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            violations = report.violations()
            lines.append(
                f"{self.name} in {key} does not agree with PyTorch and was not published: "
                f"{'; '.join(violations[:6])} ({len(violations)} limits violated; full report in {path})."
                + (f" Largest drops of R@1: {'; '.join(worst)}." if worst else "")
            )
        if published:
            lines.append(f"Published variants: {', '.join(published)}.")
        lines += [f"The earlier {key} was removed: {why}." for key, why in dropped.items()]
        return " ".join(lines)

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started


def installed_engines() -> tuple[Engine, ...]:
    """Return all installed engines; each is measured, since any of them may serve the model.

    Engines for GPUs are included if their library is installed; whether there is a GPU, and a build for it,
    is checked by their variants.
    """
    return tuple(engine for engine in Engine if is_installed(engine))


def _with_forms(options: ExportOptions) -> ExportOptions:
    """Fill in the default variants."""
    if options.forms:
        return options
    able = tuple(engine for engine in FP32.opened_by if engine in installed_engines())
    return dataclasses.replace(options, forms=(dataclasses.replace(FP32, opened_by=able),))


def require_free(repository: Path, name: str, options: ExportOptions) -> None:
    """Check that the name is valid and the variants are free, before any work.

    Raises:
        ExportError: the repository already has one of the variants, and ``replace`` is not set.
        ManifestError: the name is not a valid model name, or its manifest is malformed.
        EngineError: a variant cannot be built or measured on this machine.
    """
    require_name(name)
    for form in options.forms:
        form.require_here()
    if repository.exists() and not repository.is_dir():
        raise ExportError(f"{repository} is a file; pass a folder for the repository.")
    published = _published(repository, name, replace=options.replace)
    taken = [form.key for form in options.forms if published and form.key in published.variants]
    if taken and not options.replace:
        raise ExportError(
            f"{repository} already holds {name} in {taken[0]}. Pass --replace, or another --name."
        )


def _published(repository: Path, name: str, *, replace: bool) -> Manifest | None:
    """Read the existing manifest, if any; ignore a malformed one if it will be replaced."""
    if not manifest_path(repository / name).is_file():
        return None
    try:
        return Manifest.read(repository / name)
    except ManifestError:
        if replace:
            return None
        raise


def _require_same_vocabulary(
    published: Manifest | None, towers: Towers, repository: Path, options: ExportOptions
) -> None:
    """Check that published variants have the same part of the vocabulary, as a model has one tokenizer."""
    if published is None or options.replace or published.fingerprint == towers.fingerprint:
        return
    if published.vocabulary or towers.kept is not None:
        held = published.vocabulary[0].languages if published.vocabulary else ("all languages",)
        raise ExportError(
            f"{repository} already holds {published.name} with the vocabulary of {', '.join(held)}, and the "
            "variants of a model share one. Pass another --name, or --replace to remove its variants."
        )


def _measured_on(form: Form) -> dict[str, object]:
    """Return the machine whose vectors are compared: its processor, and the GPU of a form for one."""
    if form.engine not in GPU_ENGINES:
        return machine_facts()
    provider = {"provider": CUDA_PROVIDER} if form.engine is Engine.CUDA else {}
    return {**machine_facts(), **gpu_record(0 if form.device is None else form.device.gpu or 0), **provider}


def _versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def name_of_checkpoint(checkpoint: str | Path) -> str:
    """Derive a valid model name from the checkpoint's folder or file name."""
    path = Path(str(checkpoint))
    stem = path.stem if path.suffix == ".ckpt" else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    def show(stage: str, done: int, total: int) -> None:
        progress(f"{prefix} {stage}", done, total)

    return show
