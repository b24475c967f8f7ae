"""Repositories that hold variants for a GPU, made from exports for the CPU: nothing in them is run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from export.triton.tower_config import tower_config
from export.triton.tower_folders import max_batch_size
from runtime.manifest import (
    Engine,
    Manifest,
    Modality,
    Precision,
    TowerFiles,
    manifest_path,
    record_of_file,
    tower_folder_name,
    variant_name,
)
from runtime.triton_config import CONFIG_FILE


def repository_for_cuda(model: Path, target: Path, *, only: bool = False) -> Path:
    """Copy a model's repository with a variant ``fp16_cuda`` beside ``fp32``, or in its place."""
    repository = target
    repository.mkdir()
    for path in (*model.parent.glob(f"{model.name}_*"), *model.parent.glob(f"{model.name}.*")):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, repository / path.name)
    manifest = Manifest.read(repository / model.name)
    fp32 = manifest.variant(Precision.FP32)
    key = variant_name(Precision.FP16, Engine.CUDA.value)
    text, image = (_tower(repository, manifest, key, modality) for modality in Modality)
    variant = dataclasses.replace(
        fp32,
        precision=Precision.FP16,
        engines=(Engine.CUDA.value,),
        text=text,
        image=image,
        tokenizer=f"{text.model}/tokenizer.json",
    )
    variants = {**({} if only else manifest.variants), key: variant}
    if only:
        for modality in Modality:
            shutil.rmtree(repository / fp32.tower(modality).model)
    front_ends = () if only else manifest.front_ends
    written = dataclasses.replace(manifest, variants=variants, front_ends=front_ends)
    manifest_path(repository / model.name).write_text(written.to_json(), encoding="utf-8")
    return repository / model.name


def _tower(repository: Path, manifest: Manifest, key: str, modality: Modality) -> TowerFiles:
    source = manifest.variant(Precision.FP32).tower(modality)
    folder = repository / tower_folder_name(manifest.name, modality, key)
    shutil.copytree(repository / source.model, folder)
    shutil.rmtree(folder / "warmup", ignore_errors=True)
    rows = max_batch_size(modality, Engine.CUDA)
    config = tower_config(
        folder,
        folder / "1" / source.graph,
        engine=Engine.CUDA,
        precision=Precision.FP16,
        fingerprint=manifest.fingerprint,
        max_batch_size=rows,
        context_length=manifest.text.context_length,
    )
    (folder / CONFIG_FILE).write_text(config.to_pbtxt(), encoding="utf-8")
    files = tuple(record_of_file(repository, path) for path in sorted(folder.rglob("*")) if path.is_file())
    return dataclasses.replace(source, model=folder.name, max_batch_size=rows, files=files)
