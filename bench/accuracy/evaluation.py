"""Embed a retrieval set with PyTorch and with an exported model, and make the report."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.accuracy.retrieval_report import (
    Evaluation,
    ModelFacts,
    RetrievalReport,
)
from bench.datasets import RetrievalSet
from bench.datasets.language_maps import LanguageMap
from bench.records.environment import environment
from export.checkpoint import towers_from_checkpoint
from export.parity.limits import limits_of
from export.repository import ExportOptions, installed_engines, repository_from_towers
from export.retrieval.comparison import LanguageFigures, compare_language
from export.retrieval.metrics import RetrievalProtocol, agreement
from export.retrieval.vectors import (
    REFERENCE_PADDING,
    Progress,
    TextIndex,
    Vectors,
    exported_vectors,
    reference_vectors,
    silent,
    spoken_part,
)
from export.towers import Towers
from export.variants import forms_for
from runtime.device import Device
from runtime.errors import InputError, ManifestError
from runtime.fingerprints import remark_on_models
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Manifest, Precision, manifest_path

__all__ = [
    "EvaluationSettings",
    "chosen_dim",
    "evaluate",
    "evaluate_sample",
    "evaluate_towers",
    "facts_of",
    "require_same_space",
    "sample_model",
    "timed",
]


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        threads: Threads of PyTorch and of the engine; ``None`` leaves both at their defaults. The sample
            towers are so small that a second thread slows them down.
        dim: Width of the vectors, one of the model's MRL heads; the full width by default.
        language_map: Map that the set was read with; recorded in the report.
        device: Device of the exported towers; None for the engine's own.
    """

    engine: Engine = Engine.ONNXRUNTIME
    precision: Precision = Precision.FP32
    threads: int | None = 1
    protocol: RetrievalProtocol = RetrievalProtocol.ANY
    language_map: LanguageMap = LanguageMap.RIGHT
    dim: int | None = None
    device: Device | None = None


_GATED_CAPTIONS = 16
"""Captions per language for the exporter's own gate; all of them are measured afterwards."""


def evaluate(
    checkpoint: str | Path,
    model: str | Path,
    dataset: RetrievalSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate an exported model beside its checkpoint.

    Raises:
        ManifestError: the model was exported from other weights, or not in that precision.
        BabeltowerError: the checkpoint, the model or an image cannot be read.
    """
    return evaluate_towers(towers_from_checkpoint(checkpoint), checkpoint, model, dataset, settings, progress)


def evaluate_sample(
    checkpoint: str | Path,
    repository: Path,
    dataset: RetrievalSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> Evaluation:
    """Export the checkpoint unless the repository has it with these weights, then ``evaluate``."""
    towers = towers_from_checkpoint(checkpoint)
    model = sample_model(towers, Path(checkpoint).name, repository, settings, progress)
    return evaluate_towers(towers, checkpoint, model, dataset, settings, progress)


def sample_model(
    towers: Towers, name: str, repository: Path, settings: EvaluationSettings, progress: Progress = silent
) -> Path:
    """Return ``REPOSITORY/NAME`` in the requested variant, exporting it unless it has these weights."""
    if not _holds(repository / name, towers, settings):
        forms = forms_for(
            [settings.precision],
            [settings.engine],
            installed=installed_engines(),
            device=settings.device,
        )
        few = 0 if settings.precision is Precision.FP32 else _GATED_CAPTIONS
        options = ExportOptions(
            forms=forms, replace=True, captions_per_language=few, threads=settings.threads
        )
        repository_from_towers(towers, repository, name=name, options=options, progress=progress)
    return repository / name


def evaluate_towers(
    towers: Towers,
    checkpoint: str | Path,
    model: str | Path,
    dataset: RetrievalSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate as ``evaluate`` does, with towers that are already loaded."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dim = chosen_dim(towers, settings)
    dataset, unspoken = spoken_part(dataset, towers)
    index = TextIndex.of(dataset, with_language=towers.text_preprocessing.needs_language)
    seconds: dict[str, float] = {}
    with LocalEncoder.from_repository(
        model,
        engine=settings.engine,
        precision=settings.precision,
        threads=settings.threads,
        device=settings.device,
    ) as encoder:
        require_same_space(encoder.manifest, towers, model)
        facts = facts_of(encoder.manifest, checkpoint, settings)
        with timed(seconds, "exported"):
            exported = exported_vectors(encoder, dataset, index, dim=dim, progress=progress)
    with timed(seconds, "pytorch"):
        reference = reference_vectors(
            towers.reference, dataset, index, dim=dim, text=towers.text_preprocessing, progress=progress
        )
    with timed(seconds, "retrieval"):
        figures = tuple(_figures(dataset, reference, exported, settings.protocol, progress))
    report = RetrievalReport(
        model=facts,
        dataset=dataset.name,
        notes=dataset.notes,
        language_map=settings.language_map,
        protocol=settings.protocol,
        reference_padding=REFERENCE_PADDING,
        n_images=len(dataset.images),
        n_texts=len(index.texts),
        unspoken=unspoken,
        languages=figures,
        images=agreement(reference.images, exported.images),
        limits=limits_of(settings.precision, settings.engine).retrieval,
        seconds=seconds,
        environment=environment(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    return Evaluation(dataset, reference, exported, report)


def _figures(
    dataset: RetrievalSet,
    reference: Vectors,
    exported: Vectors,
    protocol: RetrievalProtocol,
    progress: Progress,
) -> Iterator[LanguageFigures]:
    n = len(dataset.captions)
    for done, captions in enumerate(dataset.captions):
        progress("languages", done, n)
        yield compare_language(dataset, captions, reference, exported, protocol)
    progress("languages", n, n)


def chosen_dim(towers: Towers, settings: EvaluationSettings) -> int:
    """Return the vector width to compare.

    Raises:
        InputError: the towers have no vectors of the requested width.
    """
    dim = settings.dim or towers.dim
    if dim not in towers.dims:
        raise InputError(f"The towers have no vectors of width {dim}; they have {sorted(towers.dims)}.")
    return dim


def _holds(model: Path, towers: Towers, settings: EvaluationSettings) -> bool:
    if not manifest_path(model).is_file():
        return False
    try:
        manifest = Manifest.read(model)
        manifest.variant(settings.precision, settings.engine.value)
    except ManifestError:
        return False
    return manifest.fingerprint == towers.fingerprint


def require_same_space(manifest: Manifest, towers: Towers, model: str | Path) -> None:
    """Refuse a model that was exported from other weights.

    Raises:
        ManifestError: its fingerprint differs from the checkpoint's.
    """
    if manifest.fingerprint != towers.fingerprint:
        raise ManifestError(
            f"{model} has fingerprint {manifest.fingerprint[:16]}…; the checkpoint has "
            f"{towers.fingerprint[:16]}…. It was exported from another checkpoint: export this one."
            + remark_on_models(manifest.fingerprint, towers.fingerprint)
        )


def facts_of(manifest: Manifest, checkpoint: str | Path, settings: EvaluationSettings) -> ModelFacts:
    """Describe the compared model for a report."""
    is_local = Path(checkpoint).exists()
    return ModelFacts(
        name=manifest.name,
        family=manifest.family,
        architecture=manifest.architecture,
        licence=manifest.licence,
        dim=settings.dim or manifest.dim,
        fingerprint=manifest.fingerprint,
        checkpoint=Path(checkpoint).resolve().name if is_local else str(checkpoint),
        engine=settings.engine,
        precision=settings.precision,
        threads=settings.threads,
    )


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to ``seconds``."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
