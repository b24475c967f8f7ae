"""Convert an FP32 graph to one with large weights stored as bfloat16, for OpenVINO's bf16 inference.

In OpenVINO, BF16 is an inference precision (``INFERENCE_PRECISION_HINT``), set by the backend and recorded in
the manifest; the graph's operations remain FP32. Weights that the engine would round at compile time are
rounded in the file instead, which halves the file size and gives identical vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from export.graphs.files import bytes_on_disk, save_graph
from export.graphs.float_types import cast_of, weight_as
from export.graphs.matrix_products import PRODUCTS

__all__ = ["Bf16Report", "bf16_from_onnx"]

_SMALLEST = 1024
"""Minimum number of elements of a weight to convert; smaller weights save no space."""


@dataclass(frozen=True, slots=True)
class Bf16Report:
    """Summary of a graph with bfloat16 weights."""

    n_weights: int
    source_bytes: int
    target_bytes: int


def bf16_from_onnx(source: Path, target: Path, *, data_name: str) -> Bf16Report:
    """Store weights of matrix products and embedding tables as bfloat16, each followed by a Cast to FP32.

    Other weights stay FP32, since the engine may add them in FP32: vectors equal those of ``source`` under
    the same precision hint.

    Args:
        source: FP32 ONNX file.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
    """
    model = onnx_ir.load(source)
    chosen = [value for value in model.graph.initializers.values() if _is_operand(value)]
    for value in chosen:
        _store(model.graph, value)
    model.metadata_props["babeltower.precision"] = "bf16"
    save_graph(model, target, data_name=data_name)
    return Bf16Report(len(chosen), bytes_on_disk(source), bytes_on_disk(target))


def _is_operand(value: onnx_ir.Value) -> bool:
    weight, readers = value.const_value, {use.node.op_type for use in value.uses()}
    return (
        value.dtype is onnx_ir.DataType.FLOAT
        and weight is not None
        and weight.size >= _SMALLEST
        and readers <= PRODUCTS | {"Gather"}
    )


def _store(graph: onnx_ir.Graph, value: onnx_ir.Value) -> None:
    name, weight = str(value.name), value.const_value
    assert weight is not None
    value.name = f"{name}_fp32"
    stored = weight_as(weight, onnx_ir.DataType.BFLOAT16, name)
    cast = cast_of(stored, onnx_ir.DataType.FLOAT, f"{name}_widened")
    del graph.initializers[f"{name}_fp32"]
    graph.register_initializer(stored)
    value.replace_all_uses_with(cast.outputs[0])
    graph.insert_before(graph[0], cast)
