"""Graph pass that spells out the operators of packed texts in others that a processor has.

``RemovePadding``, ``PackedMultiHeadAttention`` and ``RestorePadding`` exist on CUDA alone. Spelled out, a
packed graph runs anywhere, slowly, with the same values under the same names: to measure activations, and to
judge the graph without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight
from export.graphs.fused_norms import CONTRIB

__all__ = ["spell_out_packing"]

_FLOAT, _INT32, _INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT32, onnx_ir.DataType.INT64


def spell_out_packing(model: onnx_ir.Model) -> int:
    """Replace the operators of packed texts in an FP32 graph, in place.

    Returns:
        Number of replaced nodes.
    """
    n_replaced = 0
    for node in list(model.graph):
        if (spell := _SPELLINGS.get(node.op_type)) is None:
            continue
        steps = _Steps(model.graph, str(node.name))
        found = spell(steps, node)
        model.graph.insert_before(node, steps.nodes)
        for old, new in zip(node.outputs, found, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = f"{old.name}/spelled_out"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        n_replaced += 1
    return n_replaced


class _Steps:
    """Builder of the nodes that stand for one."""

    def __init__(self, graph: onnx_ir.Graph, name: str) -> None:
        self.graph, self.name, self.nodes = graph, name, list[onnx_ir.Node]()

    def add(
        self, op: str, *inputs: onnx_ir.Value | None, domain: str = "", **attributes: int | float
    ) -> onnx_ir.Value:
        """Append a node; return its only output."""
        name = f"{self.name}/{op}_{len(self.nodes)}"
        node = onnx_ir.node(op, inputs, attributes, domain=domain, name=name)
        self.nodes.append(node)
        node.outputs[0].name = f"{name}_out"
        return node.outputs[0]

    def ints(self, *values: int) -> onnx_ir.Value:
        """Add an int64 vector."""
        return add_weight(self.graph, f"{self.name}/ints", np.array(values, np.int64))

    def cast(self, value: onnx_ir.Value | None, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        """Convert a value."""
        return self.add("Cast", value, to=dtype.value)

    def kept(self, counts: onnx_ir.Value, offsets: onnx_ir.Value | None) -> onnx_ir.Value:
        """Return the first places of a list of places, as many as there are tokens."""
        n_tokens = self.add("ReduceSum", counts, keepdims=1)
        flat = self.add("Reshape", self.cast(offsets, _INT64), self.ints(-1))
        return self.add("Slice", flat, self.ints(0), n_tokens)

    def restored(self, rows: onnx_ir.Value | None, places: onnx_ir.Value, offsets: Any) -> onnx_ir.Value:
        """Put rows (tokens, width) at their places in zeros (batch, sequence, width)."""
        width = self.add("Slice", self.add("Shape", rows), self.ints(1), self.ints(2))
        size = self.add("Reshape", self.add("Size", offsets), self.ints(1))
        zeros = self.add("ConstantOfShape", self.add("Concat", size, width, axis=0))
        placed = self.add("ScatterND", zeros, self.add("Unsqueeze", places, self.ints(1)), rows)
        shape = self.add("Concat", self.add("Shape", offsets), width, axis=0)
        return self.add("Reshape", placed, shape)


def _remove_padding(steps: _Steps, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
    padded, counts = node.inputs
    n_tokens = steps.cast(counts, _INT64)
    shape = steps.add("Shape", padded)
    sequence = steps.add("Squeeze", steps.add("Slice", shape, steps.ints(1), steps.ints(2)), steps.ints(0))
    zero, one = (add_weight(steps.graph, f"{steps.name}/{n}", np.int64(n)) for n in (0, 1))
    columns = steps.add("Unsqueeze", steps.add("Range", zero, sequence, one), steps.ints(0))
    is_token = steps.add("Less", columns, steps.add("Unsqueeze", n_tokens, steps.ints(1)))
    flat = steps.add("Reshape", is_token, steps.ints(-1))
    width = steps.add("Slice", shape, steps.ints(2), steps.ints(3))
    rows = steps.add("Reshape", padded, steps.add("Concat", steps.ints(-1), width, axis=0))
    tokens = steps.add("Compress", rows, flat, axis=0)
    places = [
        steps.add("Reshape", steps.add("NonZero", part), steps.ints(-1))
        for part in (flat, steps.add("Not", flat))
    ]
    offsets = steps.add("Reshape", steps.add("Concat", *places, axis=0), steps.add("Shape", is_token))
    ends = steps.add("Concat", steps.ints(0), steps.add("CumSum", n_tokens, zero), axis=0)
    longest = steps.add("ReduceMax", counts, keepdims=1)
    return tokens, steps.cast(offsets, _INT32), steps.cast(ends, _INT32), longest


def _attention(steps: _Steps, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
    offsets, ends = node.inputs[4], node.inputs[5]
    last = steps.ints(np.iinfo(np.int64).max)
    counts = steps.add(
        "Sub",
        steps.add("Slice", ends, steps.ints(1), last),
        steps.add("Slice", ends, steps.ints(0), steps.ints(-1)),
    )
    places = steps.kept(steps.cast(counts, _INT64), offsets)
    padded = [steps.restored(value, places, offsets) for value in node.inputs[:3]]
    given = {
        "num_heads": node.attributes.get_int("num_heads", 0),
        "scale": node.attributes.get_float("scale", 0.0),
        "mask_filter_value": -30_000.0,
    }
    mixed = steps.add("MultiHeadAttention", *padded, None, counts, domain=CONTRIB, **given)
    width = steps.add("Slice", steps.add("Shape", mixed), steps.ints(2), steps.ints(3))
    rows = steps.add("Reshape", mixed, steps.add("Concat", steps.ints(-1), width, axis=0))
    return [steps.add("Gather", rows, places, axis=0)]


def _restore_padding(steps: _Steps, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
    rows, offsets = node.inputs
    n_tokens = steps.add("Slice", steps.add("Shape", rows), steps.ints(0), steps.ints(1))
    flat = steps.add("Reshape", steps.cast(offsets, _INT64), steps.ints(-1))
    return [steps.restored(rows, steps.add("Slice", flat, steps.ints(0), n_tokens), offsets)]


_SPELLINGS: dict[str, Callable[[_Steps, onnx_ir.Node], Sequence[onnx_ir.Value]]] = {
    "RemovePadding": _remove_padding,
    "PackedMultiHeadAttention": _attention,
    "RestorePadding": _restore_padding,
}
