"""Exports of the sample checkpoints for benchmarks, kept under ``build/bench`` while they are current.

Only speed is measured, so the gate uses part of the retrieval set; ``bench/retrieval.py`` measures all of it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from bench.models.samples import ROOT, sample_checkpoint
from runtime.errors import BabeltowerError, EngineError, ParityError
from runtime.machine import n_cores
from runtime.manifest import FORMAT, GRAPH_ENGINES, Engine, Manifest, Precision, manifest_path

__all__ = [
    "ENGINES_OF",
    "FAMILIES",
    "REPOSITORY",
    "SampleExport",
    "sample_export",
    "sample_exports",
]

REPOSITORY = ROOT / "build" / "bench" / "repository"
FAMILIES = ("nllb-clip", "capivara", "altclip")
"""One sample of each family: the models that are measured by default."""

_IMAGES_SHARE, _CAPTIONS = 6, 8
ENGINES_OF: Mapping[Precision, tuple[Engine, ...]] = {
    Precision.FP32: GRAPH_ENGINES,
    Precision.FP16: (Engine.ONNXRUNTIME,),
    Precision.BF16: (Engine.OPENVINO,),
    Precision.INT8: GRAPH_ENGINES,
    Precision.FP8: (Engine.TENSORRT,),
}


@dataclass(frozen=True, slots=True)
class SampleExport:
    """``REPOSITORY/NAME``, with the reasons that some precisions could not be exported here."""

    model: Path
    errors: Mapping[Precision, str]


def sample_export(
    name: str, precisions: Sequence[Precision], *, repository: Path = REPOSITORY
) -> SampleExport:
    """Export a sample for the processor's engines unless a current export exists.

    An export is current while the checkpoint, the exporter and its libraries are unchanged.

    Raises:
        DatasetError: there is no such sample.
        BabeltowerError: FP32 could not be exported.
    """
    checkpoint = sample_checkpoint(name)
    model, stamp = repository / name, repository / f".{name}.stamp.json"
    wanted = _stamp(checkpoint)
    known_errors = _errors_of(stamp, wanted)
    errors = known_errors or {}
    present = _variants(model) if known_errors is not None else set()
    missing = [p for p in precisions if p not in errors and not (_keys(p) and _keys(p) <= present)]
    if missing:
        errors = {**errors, **_export(checkpoint, repository, missing)}
        record = {"stamp": wanted, "errors": {p.value: error for p, error in errors.items()}}
        stamp.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return SampleExport(model, errors)


def sample_exports(
    names: Sequence[str], precisions: Sequence[Precision], *, repository: Path = REPOSITORY
) -> list[SampleExport]:
    """Export several samples, one per core at a time; errors as of ``sample_export``."""
    n_workers = min(len(names), n_cores())
    task = partial(sample_export, precisions=tuple(precisions), repository=repository)
    if n_workers < 2:
        return [task(name) for name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        return list(pool.map(task, names))


def _export(checkpoint: Path, repository: Path, precisions: Sequence[Precision]) -> dict[Precision, str]:
    """Export each precision separately, so that a failure does not affect the others."""
    import torch

    from export.checkpoint import towers_from_checkpoint
    from export.parity.gate import gate_reference
    from export.repository import ExportOptions, installed_engines, repository_from_towers
    from export.retrieval.sample_set import sample_retrieval_set
    from export.retrieval.sets import Captions, RetrievalSet
    from export.variants import forms_for, possible_forms

    def part_of(whole: RetrievalSet) -> RetrievalSet:
        place = {i: n for n, i in enumerate(range(0, len(whole.images), _IMAGES_SHARE))}
        captions = []
        for entry in whole.captions:
            kept = [(t, place[i]) for t, i in zip(entry.texts, entry.image_of, strict=True) if i in place]
            if kept:
                texts, image_of = zip(*kept, strict=True)
                captions.append(Captions(entry.code, entry.language, texts, image_of))
        return replace(whole, images=tuple(whole.images[i] for i in place), captions=tuple(captions))

    torch.set_num_threads(1)  # the towers are so small that a second thread slows them down
    towers = towers_from_checkpoint(checkpoint)
    lower = [p for p in precisions if p is not Precision.FP32]
    reference = None
    if lower:
        reference = gate_reference(
            towers,
            part_of(sample_retrieval_set()),
            captions_per_language=_CAPTIONS,
            progress=lambda *_: None,
        )
    errors: dict[Precision, str] = {}
    for precision in precisions:
        try:
            wanted = forms_for([precision], ENGINES_OF[precision], installed=installed_engines())
            forms, refused = possible_forms(wanted)
            if not forms:
                raise EngineError(" ".join(refused.values()))
            options = ExportOptions(
                forms=forms,
                replace=True,
                captions_per_language=0 if precision is Precision.FP32 else _CAPTIONS,
                reference=None if precision is Precision.FP32 else reference,
                threads=1,
            )
            repository_from_towers(towers, repository, name=checkpoint.name, options=options)
        except ParityError as error:
            errors[precision] = str(error)
        except BabeltowerError as error:
            if precision is Precision.FP32:
                raise
            errors[precision] = str(error)
    return errors


def _keys(precision: Precision) -> set[str]:
    """Return the keys of the variants of a precision that can be made on this machine."""
    from export.variants import FORMS, possible_forms

    engines = ENGINES_OF[precision]
    forms, _ = possible_forms(
        [f for f in FORMS if f.precision is precision and set(f.opened_by) & set(engines)]
    )
    return {form.key for form in forms}


def _variants(model: Path) -> set[str]:
    return set(Manifest.read(model).variants) if manifest_path(model).is_file() else set()


def _errors_of(stamp: Path, wanted: str) -> dict[Precision, str] | None:
    """Return the errors of a current export; ``None`` if there is none."""
    if not stamp.is_file():
        return None
    record = json.loads(stamp.read_text(encoding="utf-8"))
    if record["stamp"] != wanted:
        return None
    return {Precision(name): error for name, error in record["errors"].items()}


def _stamp(checkpoint: Path) -> str:
    """Return a hash of everything that an export depends on.

    It covers the checkpoint's files, the exporter's sources, the manifest's format and the libraries'
    versions.
    """
    digest = hashlib.sha256()
    sources = sorted((ROOT / "export").rglob("*.py"))
    for file in (*sorted(path for path in checkpoint.rglob("*") if path.is_file()), *sources):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    digest.update(FORMAT.encode())
    for package in ("torch", "onnx", "onnxruntime", "openvino", "onnx-ir"):
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()
