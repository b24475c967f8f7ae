"""The token table, which is most of a text tower: FP32, FP16, or int8 with one scale for each row.

A quantised table stays a plain lookup: rows of int8 and rows of scales are gathered, and multiplied. Only
the rows that a batch needs are ever widened, so that the table's memory is the file's, mapped.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graph_edits import add_weight, constant, float_like, sole_use

__all__ = ["EmbeddingTable", "shrink_table"]

_CHUNK_ROWS = 1 << 14


class EmbeddingTable(str, Enum):
    """How a table is stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def shrink_table(model: onnx_ir.Model, table: EmbeddingTable) -> str | None:
    """Store the largest gathered float matrix as ``table`` says, in place.

    Returns:
        The weight's former name; ``None`` where nothing was changed.
    """
    gather = _lookup(model.graph)
    if table is EmbeddingTable.FP32 or gather is None:
        return None
    weight = gather.inputs[0]
    rows = constant(weight)
    assert weight is not None
    assert rows is not None
    if table is EmbeddingTable.FP16:
        _gather_half(model.graph, gather, rows)
    else:
        _gather_int8(model.graph, gather, rows)
    return weight.name


def _lookup(graph: onnx_ir.Graph) -> onnx_ir.Node | None:
    """The Gather that reads the table by the graph's token ids."""
    for node in graph:
        if node.op_type == "Gather" and node.inputs[1] in graph.inputs and node.inputs[0] is not None:
            table = node.inputs[0]
            if table.is_initializer() and table.dtype == onnx_ir.DataType.FLOAT and len(table.uses()) == 1:
                return node
    return None


def _gather_half(graph: onnx_ir.Graph, gather: onnx_ir.Node, rows: NDArray[np.float32]) -> None:
    name = gather.name or "table"
    half = np.concatenate([part.astype(np.float16) for part in _chunks(rows)])
    old = gather.outputs[0]
    looked_up = onnx_ir.node(
        "Gather",
        [add_weight(graph, f"{name}/fp16", half), gather.inputs[1]],
        attributes={"axis": 0},
        name=name,
    )
    looked_up.outputs[0].dtype, looked_up.outputs[0].shape = onnx_ir.DataType.FLOAT16, old.shape
    widened = onnx_ir.node(
        "Cast", looked_up.outputs, attributes={"to": onnx_ir.DataType.FLOAT}, name=f"{name}/float"
    )
    float_like(widened, f"{old.name}_fp32", old.shape)
    _replace(graph, gather, [looked_up, widened], widened.outputs[0])


def _gather_int8(graph: onnx_ir.Graph, gather: onnx_ir.Node, rows: NDArray[np.float32]) -> None:
    name = gather.name or "table"
    quantised = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), 1), np.float32)
    for start, part in enumerate(_chunks(rows)):
        place = slice(start * _CHUNK_ROWS, start * _CHUNK_ROWS + len(part))
        largest = np.abs(part).max(axis=1, keepdims=True)
        scales[place] = np.where(largest > 0, largest / 127, 1)
        quantised[place] = np.rint(part / scales[place])
    after = sole_use(gather.outputs[0])
    factor = constant(after.inputs[1]) if after is not None and after.op_type == "Mul" else None
    ends_at = gather.outputs[0]
    if after is not None and factor is not None and factor.size == 1:
        scales *= factor.reshape(())
        ends_at = after.outputs[0]
    ids, old = gather.inputs[1], gather.outputs[0]
    codes = onnx_ir.node(
        "Gather", [add_weight(graph, f"{name}/int8", quantised), ids], attributes={"axis": 0}, name=name
    )
    codes.outputs[0].dtype, codes.outputs[0].shape = onnx_ir.DataType.INT8, old.shape
    scale = onnx_ir.node(
        "Gather",
        [add_weight(graph, f"{name}/scales", scales), ids],
        attributes={"axis": 0},
        name=f"{name}/scale",
    )
    float_like(scale, f"{old.name}_scale", None if old.shape is None else [*old.shape[:-1], 1])
    widened = onnx_ir.node(
        "Cast", codes.outputs, attributes={"to": onnx_ir.DataType.FLOAT}, name=f"{name}/float"
    )
    float_like(widened, f"{old.name}_codes", old.shape)
    scaled = onnx_ir.node("Mul", [widened.outputs[0], scale.outputs[0]], name=f"{name}/rescale")
    float_like(scaled, f"{old.name}_rows", old.shape)
    _replace(graph, gather, [codes, scale, widened, scaled], scaled.outputs[0], ends_at)


def _replace(
    graph: onnx_ir.Graph,
    gather: onnx_ir.Node,
    nodes: list[onnx_ir.Node],
    result: onnx_ir.Value,
    ends_at: onnx_ir.Value | None = None,
) -> None:
    """Put nodes in a lookup's place; ``ends_at`` is what their result stands for."""
    last = gather.outputs[0] if ends_at is None else ends_at
    end = last.producer()
    graph.insert_before(gather, nodes)
    last.replace_all_uses_with(result)
    graph.remove([gather] if end is gather or end is None else [end, gather], safe=True)


def _chunks(rows: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
