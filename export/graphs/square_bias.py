"""Repeat a padding bias for every query, as fused attention reads it.

The exported graph adds (batch, 1, 1, tokens) to the scores; ONNX Runtime's fused kernels want one row per
query. The mask may have any pattern, such as a padding token inside of a text.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, float_like, producer

__all__ = ["SquareBias", "mask_of_bias", "mask_of_square"]


class SquareBias:
    """Nodes that repeat biases, made once per bias of a graph."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._made: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def of_bias(self, bias: onnx_ir.Value, mask: onnx_ir.Value) -> onnx_ir.Value:
        """Return a bias (batch, 1, 1, tokens) as (batch, 1, tokens, tokens).

        Args:
            mask: The int64 mask (batch, tokens) that the bias was made from.
        """
        if bias not in self._made:
            self._made[bias] = self._add_nodes(bias, mask)
        return self._made[bias]

    def _add_nodes(self, bias: onnx_ir.Value, mask: onnx_ir.Value) -> onnx_ir.Value:
        assert mask.shape is not None
        rows, tokens = mask.shape
        name = f"{bias.name}/square"
        axes = add_weight(self._graph, f"{name}/axes", np.array([1, 3], np.int64))
        column = onnx_ir.node("Unsqueeze", [mask, axes], name=f"{name}/Unsqueeze")
        column.outputs[0].name, column.outputs[0].dtype = f"{name}/column", onnx_ir.DataType.INT64
        column.outputs[0].shape = onnx_ir.Shape([rows, 1, tokens, 1])
        cast = onnx_ir.node(
            "Cast", [column.outputs[0]], {"to": onnx_ir.DataType.FLOAT.value}, name=f"{name}/Cast"
        )
        float_like(cast, f"{name}/float", [rows, 1, tokens, 1])
        zero = onnx_ir.node(
            "Mul",
            [cast.outputs[0], add_weight(self._graph, f"{name}/zero", np.float32(0))],
            name=f"{name}/Mul",
        )
        float_like(zero, f"{name}/zeros", [rows, 1, tokens, 1])
        add = onnx_ir.node("Add", [bias, zero.outputs[0]], name=f"{name}/Add")
        float_like(add, f"{name}/bias", [rows, 1, tokens, tokens])
        producer = bias.producer()
        assert producer is not None
        self._graph.insert_after(producer, [column, cast, zero, add])
        return add.outputs[0]


def mask_of_square(bias: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Return the int64 mask (batch, tokens) that a ``SquareBias`` was made of; None of any other value."""
    node = producer(bias)
    return mask_of_bias(node.inputs[0]) if node is not None and node.op_type == "Add" else None


def mask_of_bias(bias: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Return the int64 mask (batch, tokens) of ``(1 − mask) · −30,000``; None of any other value."""
    value = bias
    for op in ("Mul", "Sub", "Cast", "Unsqueeze"):
        node = producer(value)
        if node is None or node.op_type != op:
            return None
        value = node.inputs[1 if op == "Sub" else 0]
    if value is None or value.dtype != onnx_ir.DataType.INT64:
        return None
    return value
