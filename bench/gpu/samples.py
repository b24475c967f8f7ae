"""Sample models for the gate: exported in FP32, with the fused graphs for CUDA beside.

An export measures a variant before it is published, and CUDA cannot be measured where a bundle is built. The
variants for CUDA are therefore listed without figures; the run on the GPU is their measurement. A model lists
one variant per engine and precision, so that packed texts have a repository of their own inside of the other.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.gate import CUDA_PRECISIONS, PACKED, PACKED_PRECISION
from bench.gpu.stamps import ExportStamp
from bench.models.full_size import in_process
from bench.models.samples import sample_checkpoint
from export.precision.calibration import CalibrationSet, calibration_from_path
from export.precision.cuda import cuda_from_onnx
from export.repository import ExportOptions, repository_from_checkpoint
from export.variants import FP32
from runtime.manifest import (
    PACKED_TEXT_RECIPE,
    Engine,
    Manifest,
    Modality,
    Precision,
    TowerFiles,
    Variant,
    manifest_path,
    record_of_file,
    tower_folder_name,
    variant_name,
)
from runtime.preprocessing.text import Tokenizer

__all__ = ["sample_repository"]

_UNMEASURED = {"measured": "nothing yet: CUDA is measured where there is a GPU"}


def sample_repository(repository: Path, samples: Sequence[str]) -> Path:
    """Export the samples, in processes of their own; kept are those of the same sources and checkpoint."""
    for name in samples:
        stamp = ExportStamp.of(
            repository / f".{name}.sha256", Path(__file__), *_files(sample_checkpoint(name))
        )
        if stamp.is_current:
            continue
        stamp.file.unlink(missing_ok=True)
        for path in (*repository.glob(f"{name}[_.]*"), *(repository / PACKED).glob(f"{name}[_.]*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        in_process(_export, name, repository)
        in_process(_add_cuda, repository / name)
        stamp.write()
    return repository


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _export(name: str, repository: Path) -> None:
    options = ExportOptions(captions_per_language=0, forms=(FP32,))
    repository_from_checkpoint(sample_checkpoint(name), repository, name=name, options=options)


def _add_cuda(model: Path) -> None:
    """Write the graphs for CUDA and list them in the manifest; those of packed texts in one beside."""
    repository = model.parent
    manifest = Manifest.read(model)
    source = manifest.variants[FP32.key]
    calibration = calibration_from_path(
        None,
        Tokenizer(repository / source.tokenizer, manifest.text),
        manifest.text,
        manifest.image,
        languages=manifest.languages,
    )
    variants = dict(manifest.variants)
    for precision in CUDA_PRECISIONS:
        key = variant_name(precision, Engine.CUDA.value)
        variants[key] = _cuda_variant(repository, manifest.name, source, precision, calibration)
    listed = dataclasses.replace(manifest, variants=variants)
    manifest_path(model).write_text(listed.to_json(), encoding="utf-8")
    packed = _cuda_variant(repository, manifest.name, source, PACKED_PRECISION, calibration, folder=PACKED)
    tokenizer = repository / PACKED / source.tokenizer
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(repository / source.tokenizer, tokenizer)
    key = variant_name(PACKED_PRECISION, Engine.CUDA.value)
    listed = dataclasses.replace(manifest, variants={key: packed}, front_ends=(), probes=())
    manifest_path(repository / PACKED / model.name).write_text(listed.to_json(), encoding="utf-8")


def _cuda_variant(
    repository: Path,
    name: str,
    source: Variant,
    precision: Precision,
    calibration: CalibrationSet,
    *,
    folder: str = "",
) -> Variant:
    """Write a variant's graphs; into a ``folder`` of the repository, those of packed texts."""
    target = repository / folder
    key = variant_name(precision, Engine.CUDA.value)
    towers: dict[Modality, TowerFiles] = {}
    for modality in Modality:
        files = source.tower(modality)
        tower = target / tower_folder_name(name, modality, key)
        graph = tower / str(files.version) / files.graph
        graph.parent.mkdir(parents=True, exist_ok=True)
        cuda_from_onnx(
            repository / files.model / str(files.version) / files.graph,
            graph,
            data_name=f"{tower.name}.data",
            precision=precision,
            batches=lambda modality=modality: calibration.batches(modality),  # type: ignore[misc]
            packed_text=bool(folder) and modality is Modality.TEXT,
        )
        records = tuple(record_of_file(target, path) for path in sorted(graph.parent.iterdir()))
        towers[modality] = dataclasses.replace(files, model=tower.name, files=records)
    return dataclasses.replace(
        source,
        precision=precision,
        engines=(Engine.CUDA.value,),
        text=towers[Modality.TEXT],
        image=towers[Modality.IMAGE],
        parity=_UNMEASURED,
        recipe={Modality.TEXT.value: {PACKED_TEXT_RECIPE: True}} if folder else {},
    )
