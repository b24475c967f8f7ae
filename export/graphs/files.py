"""Save, copy and measure ONNX files, including their external data."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir

from export.onnx_graph import EXTERNAL_DATA_OVER_BYTES

__all__ = ["bytes_on_disk", "copy_graph", "external_files", "save_graph"]


def save_graph(model: onnx_ir.Model, target: Path, *, data_name: str) -> None:
    """Write a graph to ``target``; large weights go to the external data file ``data_name`` beside it."""
    weights = (value.const_value for value in model.graph.initializers.values())
    n_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = data_name if n_bytes > EXTERNAL_DATA_OVER_BYTES else None
    if beside is None:
        onnx_ir.external_data.load_to_model(model)  # otherwise weights stay in the source's data file
    onnx_ir.save(model, target, external_data=beside, size_threshold_bytes=1024)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph and its external data files to another folder.

    Hard links would save disk space, but onnx_ir does not read weights from a file with two names.
    """
    shutil.copyfile(source, target)
    for path in external_files(onnx_ir.load(source)):
        shutil.copyfile(path, target.parent / path.name)


def bytes_on_disk(graph: Path) -> int:
    """Return the size in bytes of a graph and its external data files."""
    return sum(path.stat().st_size for path in (graph, *external_files(onnx_ir.load(graph))))


def external_files(model: onnx_ir.Model) -> set[Path]:
    """Return the external data files that hold a graph's weights."""
    weights = (value.const_value for value in model.graph.initializers.values())
    return {Path(weight.path) for weight in weights if isinstance(weight, onnx_ir.ExternalTensor)}
