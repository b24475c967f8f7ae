"""Exported models that were changed after their export, as accidents and other machines change them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from runtime.manifest import Manifest, Modality, TowerFiles, manifest_path, record_of_file
from runtime.opening.probes import OPENING_FILE

__all__ = [
    "computing_otherwise",
    "copied",
    "graph_of",
    "of_before",
    "overwritten",
    "rerecorded",
    "with_flipped_byte",
]


def copied(model: Path, folder: Path) -> Path:
    """A copy of one model's files alone: ``folder/NAME``."""
    folder.mkdir(parents=True)
    for path in model.parent.glob(f"{model.name}[._]*"):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    return folder / model.name


def graph_of(model: Path, modality: Modality, key: str = "fp32") -> Path:
    tower = Manifest.read(model).variants[key].tower(modality)
    return model.parent / tower.model / str(tower.version) / tower.graph


def computing_otherwise(model: Path, *modalities: Modality, noise: float = 0.3) -> Path:
    """Files that fit their checksums and give other vectors: what another CPU makes of a graph.

    Every float weight of some size is disturbed by a share of its own deviation, so that vectors are as far
    off as those of 8-bit products that saturate, and the manifest is written anew.
    """
    random = np.random.default_rng(0)
    for modality in modalities:
        path = graph_of(model, modality)
        graph = onnx.load(path)
        for tensor in graph.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.size > 1_000:
                changed = array + noise * array.std() * random.standard_normal(array.shape)
                tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
        onnx.save(graph, path)
    return rerecorded(model)


def rerecorded(model: Path) -> Path:
    """Write every record of the manifest anew."""
    repository, manifest = model.parent, Manifest.read(model)

    def measured(tower: TowerFiles) -> TowerFiles:
        files = tuple(
            record_of_file(repository, repository / r.path)
            for r in tower.files
            if (repository / r.path).is_file()
        )
        return dataclasses.replace(tower, files=files)

    variants = {
        key: dataclasses.replace(v, text=measured(v.text), image=measured(v.image))
        for key, v in manifest.variants.items()
    }
    front_ends = tuple(
        dataclasses.replace(f, files=tuple(record_of_file(repository, repository / r.path) for r in f.files))
        for f in manifest.front_ends
    )
    written = dataclasses.replace(manifest, variants=variants, front_ends=front_ends)
    manifest_path(model).write_text(written.to_json(), encoding="utf-8")
    return model


def of_before(model: Path) -> Path:
    """The model as it was exported before towers had opening probes."""
    for path in model.parent.rglob(OPENING_FILE):
        path.unlink()
    rerecorded(model)
    manifest = Manifest.read(model)
    variants = {
        key: dataclasses.replace(
            v, parity={k: found for k, found in v.parity.items() if k != "opening"}, measured_on={}
        )
        for key, v in manifest.variants.items()
    }
    written = dataclasses.replace(manifest, variants=variants, probes=())
    manifest_path(model).write_text(written.to_json(), encoding="utf-8")
    return model


def overwritten(path: Path, n_bytes: int = 20_000, seed: int = 0) -> None:
    """Overwrite bytes in the middle of a file's largest weight, which an engine reads all the same."""
    graph = onnx.load(path)
    largest = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    data = bytearray(path.read_bytes())
    at = bytes(data).index(largest.raw_data[:4096]) + len(largest.raw_data) // 2
    at -= at % 4
    noise = np.random.default_rng(seed).standard_normal(n_bytes // 4).astype(np.float32).tobytes()
    data[at : at + len(noise)] = noise
    path.write_bytes(bytes(data))


def with_flipped_byte(path: Path, place: str) -> None:
    """Flip one bit: at the start or end of the file, or inside a weight, where the graph still loads."""
    data = bytearray(path.read_bytes())
    if place == "weight":
        graph = onnx.load(path)
        largest = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        at = bytes(data).index(largest.raw_data[:4096]) + len(largest.raw_data) // 2
    else:
        at = {"start": 3, "end": len(data) - 2}[place]
    data[at] ^= 1
    path.write_bytes(bytes(data))
