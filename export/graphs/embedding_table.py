"""Graph pass that stores the token embedding table as FP32, FP16, or int8 with one scale per row.

The table is most of a text tower's size. A quantized table remains a plain lookup: int8 rows and their scales
are gathered and multiplied. Only the rows of a batch are converted to float, so the table itself stays
memory-mapped from the file.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight, constant, float_like, sole_use
from runtime.errors import ExportError

__all__ = ["EmbeddingTable", "shrink_table"]

_CHUNK_ROWS = 1 << 14


class EmbeddingTable(str, Enum):
    """Storage type of the token embedding table."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def shrink_table(model: onnx_ir.Model, table: EmbeddingTable) -> str | None:
    """Convert the token embedding table to the given storage type, in place.

    A constant factor of the gathered rows (M2M100's √width) is folded into the table, since OpenVINO 2026.4
    rejects a quantized graph that has it.

    Returns:
        Name of the Gather node; None if the graph has no token lookup.
    """
    gather = _lookup(model.graph)
    if gather is None:
        return None
    rows = constant(gather.inputs[0])
    assert rows is not None
    factor, end = _factor(gather)
    match table:
        case EmbeddingTable.INT8:
            nodes = _int8_lookup(model.graph, gather, rows, factor)
        case EmbeddingTable.FP16:
            nodes = _fp16_lookup(model.graph, gather, rows, factor)
        case EmbeddingTable.FP32:
            nodes = [_gather(gather, add_weight(model.graph, f"{gather.name}/fp32", rows * factor), "")]
    result = float_like(nodes[-1], f"{end.name}_rows", end.shape)
    model.graph.insert_before(gather, nodes)
    last = end.producer()
    end.replace_all_uses_with(result)
    model.graph.remove([gather] if last is None or last is gather else [last, gather], safe=True)
    return gather.name


def _lookup(graph: onnx_ir.Graph) -> onnx_ir.Node | None:
    """Return the Gather node that looks up the graph's token ids."""
    for node in graph:
        if node.op_type == "Gather" and node.inputs[1] in graph.inputs and node.inputs[0] is not None:
            table = node.inputs[0]
            if table.is_initializer() and table.dtype == onnx_ir.DataType.FLOAT and len(table.uses()) == 1:
                return node
    return None


def _factor(gather: onnx_ir.Node) -> tuple[np.float32, onnx_ir.Value]:
    """Return the scalar factor of the gathered rows (1 if none), and the value that holds the product."""
    rows = gather.outputs[0]
    after = sole_use(rows)
    factor = constant(after.inputs[1]) if after is not None and after.op_type == "Mul" else None
    if after is None or factor is None or factor.size != 1:
        return np.float32(1), rows
    return np.float32(factor.reshape(())), after.outputs[0]


def _fp16_lookup(
    graph: onnx_ir.Graph, gather: onnx_ir.Node, rows: NDArray[np.float32], factor: np.float32
) -> list[onnx_ir.Node]:
    half = np.concatenate([(part * factor).astype(np.float16) for part in _chunks(rows)])
    if not np.isfinite(half).all():
        raise ExportError("The token table has values outside FP16's range; store it as int8 or FP32.")
    looked_up = _gather(gather, add_weight(graph, f"{gather.name}/fp16", half), "")
    return [looked_up, _cast(gather, looked_up)]


def _int8_lookup(
    graph: onnx_ir.Graph, gather: onnx_ir.Node, rows: NDArray[np.float32], factor: np.float32
) -> list[onnx_ir.Node]:
    # Symmetric per-row quantization; the factor goes into the scales, so that the codes are unaffected.
    codes = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), 1), np.float32)
    for start, part in enumerate(_chunks(rows)):
        place = slice(start * _CHUNK_ROWS, start * _CHUNK_ROWS + len(part))
        largest = np.abs(part).max(axis=1, keepdims=True)
        scales[place] = np.where(largest > 0, largest / 127, 1)
        codes[place] = np.rint(part / scales[place])
    looked_up = _gather(gather, add_weight(graph, f"{gather.name}/int8", codes), "")
    scale = _gather(gather, add_weight(graph, f"{gather.name}/scales", scales * factor), "/scale")
    widened = _cast(gather, looked_up)
    product = onnx_ir.node("Mul", [widened.outputs[0], scale.outputs[0]], name=f"{gather.name}/rescale")
    return [looked_up, scale, widened, product]


def _gather(like: onnx_ir.Node, table: onnx_ir.Value, suffix: str) -> onnx_ir.Node:
    """Create a Gather of the same ids from another table."""
    node = onnx_ir.node(
        "Gather", [table, like.inputs[1]], attributes={"axis": 0}, name=f"{like.name}{suffix}"
    )
    assert table.shape is not None
    node.outputs[0].type = table.type
    ids = like.inputs[1]
    if ids is not None and ids.shape is not None:
        node.outputs[0].shape = onnx_ir.Shape([*ids.shape, table.shape[1]])
    return node


def _cast(like: onnx_ir.Node, looked_up: onnx_ir.Node) -> onnx_ir.Node:
    node = onnx_ir.node(
        "Cast",
        looked_up.outputs,
        attributes={"to": onnx_ir.DataType.FLOAT},
        name=f"{like.name}/float",
    )
    float_like(node, f"{like.outputs[0].name}_widened", looked_up.outputs[0].shape)
    return node


def _chunks(rows: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
