"""Graphs on disk: small ones whole, large ones with their weights beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir

from export.onnx_graph import EXTERNAL_DATA_OVER_BYTES

__all__ = ["bytes_on_disk", "copy_graph", "external_files", "save_graph"]


def save_graph(model: onnx_ir.Model, target: Path, *, data_name: str) -> None:
    """Write a graph to ``target`` and, where its weights are large, those beside it as ``data_name``."""
    weights = (value.const_value for value in model.graph.initializers.values())
    n_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = data_name if n_bytes > EXTERNAL_DATA_OVER_BYTES else None
    if beside is None:
        onnx_ir.external_data.load_to_model(model)  # else what the source kept beside it stays there
    onnx_ir.save(model, target, external_data=beside, size_threshold_bytes=1024)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph to another folder, its weights' files beside it.

    A link would do for the disk, but onnx_ir reads no weights from a file that has two names.
    """
    shutil.copyfile(source, target)
    for path in external_files(onnx_ir.load(source)):
        shutil.copyfile(path, target.parent / path.name)


def bytes_on_disk(graph: Path) -> int:
    """Bytes of a graph and of what lies beside it."""
    return sum(path.stat().st_size for path in (graph, *external_files(onnx_ir.load(graph))))


def external_files(model: onnx_ir.Model) -> set[Path]:
    """Files beside a graph that hold its weights."""
    weights = (value.const_value for value in model.graph.initializers.values())
    return {Path(weight.path) for weight in weights if isinstance(weight, onnx_ir.ExternalTensor)}
