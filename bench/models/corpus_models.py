"""Full-size models with random weights, in FP32 and INT8, for the corpus benchmarks.

INT8 figures show speed only: random weights say nothing about INT8's loss, so parity is not required.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.models.full_size import checkpoint_from_variant
from export.precision.calibration import CalibrationSize, calibration_from_samples
from export.precision.int8 import GraphTarget, int8_from_onnx, recipe_for
from export.repository import repository_from_checkpoint
from runtime.manifest import (
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

__all__ = ["full_size_model"]


def full_size_model(variant: str, folder: Path) -> Path:
    """Return ``REPOSITORY/NAME`` of a published variant with random weights, made on first use."""
    repository = folder / "repository"
    model, checkpoint = repository / variant, folder / "checkpoints" / variant
    if not checkpoint.is_dir():
        checkpoint_from_variant(variant, checkpoint)
    if not manifest_path(model).is_file():
        repository_from_checkpoint(checkpoint, repository, name=variant)
    manifest = Manifest.read(model)
    key = variant_name(Precision.INT8, Engine.OPENVINO.value)
    if key not in manifest.variants:
        int8 = _int8_variant(manifest, repository, key)
        manifest = dataclasses.replace(manifest, variants={**manifest.variants, key: int8})
        manifest_path(model).write_text(manifest.to_json(), encoding="utf-8")
    return model


def _int8_variant(manifest: Manifest, repository: Path, key: str) -> Variant:
    fp32 = manifest.variant(Precision.FP32)
    calibration = calibration_from_samples(
        Tokenizer(repository / fp32.tokenizer, manifest.text),
        manifest.text,
        manifest.image,
        languages=manifest.languages,
        size=CalibrationSize(32, 16),
    )
    towers: dict[str, TowerFiles] = {}
    for modality in Modality:
        files = fp32.tower(modality)
        source = repository / files.model / str(files.version) / files.graph
        name = tower_folder_name(manifest.name, modality, key)
        target = repository / name / str(files.version) / files.graph
        target.parent.mkdir(parents=True, exist_ok=True)
        int8_from_onnx(
            source,
            target,
            data_name=f"{files.graph}.data",
            calibration=calibration.batches(modality),
            recipe=recipe_for(GraphTarget.OPENVINO),
        )
        records = [record_of_file(repository, path) for path in sorted(target.parent.iterdir())]
        towers[modality.value] = dataclasses.replace(files, model=name, files=tuple(records))
    return dataclasses.replace(
        fp32,
        precision=Precision.INT8,
        engines=(Engine.OPENVINO.value,),
        text=towers["text"],
        image=towers["image"],
        parity={"note": "random weights, not compared"},
    )
