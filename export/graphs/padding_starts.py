"""Convert a padding mask to the lengths that fused attention reads, and refuse masks that have none.

The form is that of ONNX Runtime's ``MASK_1D_KEY_SEQ_LEN_START``, the only one with which its memory-efficient
kernels skip padding: int32 (3 × batch + 2), the batch's lengths, then twice the positions at which each row
starts and the last one ends when all rows are laid end to end.

Lengths say nothing of a mask with holes. The vectors of such a row become NaN, which every reader refuses, so
that it never gets a plausible wrong vector.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight

__all__ = ["PaddingStarts"]


class PaddingStarts:
    """Nodes that compute lengths and starts, made once per mask of a graph."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._made: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._flaws: list[onnx_ir.Value] = []

    def of_mask(self, mask: onnx_ir.Value) -> onnx_ir.Value:
        """Return the int32 (3 × batch + 2) of an int64 mask (batch, tokens)."""
        if mask not in self._made:
            self._made[mask] = self._add_nodes(mask)
        return self._made[mask]

    def guard_outputs(self) -> None:
        """Add to each row of each graph output 0, or NaN if its mask has holes."""
        for index, output in enumerate(self._graph.outputs):
            for flaw in self._flaws:
                name = str(output.name)
                output.name = f"{name}/unguarded"
                node = onnx_ir.node("Add", [output, flaw], name=f"{name}/guard")
                guarded = node.outputs[0]
                guarded.name, guarded.dtype, guarded.shape = name, output.dtype, output.shape
                self._graph.append(node)
                self._graph.outputs[index] = guarded
                output = guarded

    def _add_nodes(self, mask: onnx_ir.Value) -> onnx_ir.Value:
        assert mask.shape is not None
        rows = mask.shape[0]
        whole, single = onnx_ir.DataType.INT32, onnx_ir.DataType.FLOAT
        steps = _Steps(self._graph, mask)
        axis = steps.weight("axis", np.array([1], np.int64))
        first, second = (
            steps.weight("rows_axis", np.array(0, np.int64)),
            steps.weight("tokens_axis", np.array(1, np.int64)),
        )
        zero = steps.weight("zero", np.zeros((), np.float32))
        one = steps.weight("one", np.ones((), np.float32))
        # sums of floats: those of integers need cuDNN on a GPU, and counts are exact either way
        present = steps.add("Cast", [mask], single, mask.shape, to=single.value)
        ones = steps.add(
            "Add", [steps.add("Mul", [present, zero], single, mask.shape), one], single, mask.shape
        )
        places = steps.add("CumSum", [ones, second], single, mask.shape)
        length = steps.add("ReduceSum", [present, axis], single, [rows], keepdims=0)
        tokens = steps.add("ReduceSum", [ones, axis], single, [rows], keepdims=0)
        ends = steps.add("CumSum", [tokens, first], single, [rows])
        none = steps.weight("none", np.zeros(1, np.float32))
        # a mask without holes has its tokens at 1 … n, whose sum is n (n + 1) / 2
        placed = steps.add("Mul", [present, places], single, mask.shape)
        found = steps.add("ReduceSum", [placed, axis], single, [rows], keepdims=0)
        more = steps.add("Add", [length, one], single, [rows])
        expected = steps.add("Mul", [steps.add("Mul", [length, more], single, [rows]), steps.weight("half", np.float32(0.5))], single, [rows])  # fmt: skip
        excess = steps.add("Sub", [found, expected], single, [rows])
        # 0 → 0, anything else → NaN: (e / 0) · 0 is NaN for e > 0, and e is never below 0
        flaw = steps.add("Where", [steps.add("Cast", [excess], onnx_ir.DataType.BOOL, [rows], to=onnx_ir.DataType.BOOL.value), steps.weight("nan", np.float32(np.nan)), zero], single, [rows])  # fmt: skip
        column = steps.add("Unsqueeze", [flaw, axis], single, [rows, 1])
        self._flaws.append(column)
        parts = steps.add("Concat", [length, none, ends, none, ends], single, None, axis=0)
        return steps.add("Cast", [parts], whole, None, to=whole.value)


class _Steps:
    """Builder of nodes after the producer of a mask, in order."""

    def __init__(self, graph: onnx_ir.Graph, mask: onnx_ir.Value) -> None:
        self._graph, self._name = graph, f"{mask.name}/padding"
        self._last = mask.producer()

    def weight(
        self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] | np.generic
    ) -> onnx_ir.Value:
        """Add an initializer."""
        return add_weight(self._graph, f"{self._name}/{name}", array)

    def add(
        self,
        op: str,
        inputs: list[onnx_ir.Value],
        dtype: onnx_ir.DataType,
        shape: onnx_ir.Shape | list[object] | None,
        **attributes: int,
    ) -> onnx_ir.Value:
        """Add a node with one output; return the output."""
        node = onnx_ir.node(op, inputs, attributes=attributes, name=f"{self._name}/{op}")
        node.name = f"{self._name}/{op}_{id(node) & 0xFFFF}"
        output = node.outputs[0]
        output.name, output.dtype = f"{node.name}_out", dtype
        output.shape = None if shape is None else onnx_ir.Shape(shape)
        if self._last is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._last, node)
        self._last = node
        return output
