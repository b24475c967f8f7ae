"""Convert a padding mask to the lengths that fused attention reads, and refuse masks that have none.

The form is that of ONNX Runtime's ``MASK_1D_KEY_SEQ_LEN_START``, the only one with which its memory-efficient
kernels skip padding: int32 (3 × batch + 2), the batch's lengths, then twice the positions at which each row
starts and the last one ends when all rows are laid end to end.

Lengths say nothing of a mask with holes. The vectors of such a row become NaN, which every reader refuses, so
that it never gets a plausible wrong vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight

__all__ = ["PaddingStarts"]

_FLOAT, _INT32, _BOOL = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT32, onnx_ir.DataType.BOOL


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
        for index in range(len(self._graph.outputs)):
            for flaw in self._flaws:
                value = self._graph.outputs[index]
                name = str(value.name)
                value.name = f"{name}/unguarded"
                node = onnx_ir.node("Add", [value, flaw], name=f"{name}/guard")
                guarded = node.outputs[0]
                guarded.name, guarded.dtype, guarded.shape = name, _FLOAT, value.shape
                self._graph.append(node)
                self._graph.outputs[index] = guarded

    def _add_nodes(self, mask: onnx_ir.Value) -> onnx_ir.Value:
        assert mask.shape is not None
        rows = [mask.shape[0]]
        steps = _Steps(self._graph, mask)
        tokens_axis = steps.weight("axis", np.array([1], np.int64))
        zero, one = steps.weight("zero", np.float32(0)), steps.weight("one", np.float32(1))
        # sums of floats: those of integers need cuDNN on a GPU, and counts are exact either way
        present = steps.cast(mask, _FLOAT, mask.shape)
        ones = steps.add("Mul", [present, zero], mask.shape)
        ones = steps.add("Add", [ones, one], mask.shape)
        length = steps.add("ReduceSum", [present, tokens_axis], rows, keepdims=0)
        n_tokens = steps.add("ReduceSum", [ones, tokens_axis], rows, keepdims=0)
        ends = steps.add("CumSum", [n_tokens, steps.weight("rows", np.array(0, np.int64))], rows)
        self._flaws.append(self._flaw(steps, present, ones, length, tokens_axis))
        start = steps.weight("start", np.zeros(1, np.float32))
        parts = steps.add("Concat", [length, start, ends, start, ends], None, axis=0)
        return steps.cast(parts, _INT32, None)

    def _flaw(
        self,
        steps: _Steps,
        present: onnx_ir.Value,
        ones: onnx_ir.Value,
        length: onnx_ir.Value,
        tokens_axis: onnx_ir.Value,
    ) -> onnx_ir.Value:
        """Return (batch, 1): 0, or NaN for a row whose tokens are not the first ones.

        Without holes the tokens' places are 1 … n, whose sum is n (n + 1) / 2.
        """
        rows, shape = [length.shape[0] if length.shape else None], present.shape
        places = steps.add("CumSum", [ones, steps.weight("tokens", np.array(1, np.int64))], shape)
        placed = steps.add("Mul", [present, places], shape)
        found = steps.add("ReduceSum", [placed, tokens_axis], rows, keepdims=0)
        doubled = steps.add("Add", [found, found], rows)
        next_length = steps.add("Add", [length, steps.weight("next", np.float32(1))], rows)
        expected = steps.add("Mul", [length, next_length], rows)
        excess = steps.cast(steps.add("Sub", [doubled, expected], rows), _BOOL, rows)
        nan, zero = steps.weight("nan", np.float32(np.nan)), steps.weight("fine", np.float32(0))
        flaw = steps.add("Where", [excess, nan, zero], rows)
        return steps.add("Unsqueeze", [flaw, tokens_axis], [*rows, 1])


class _Steps:
    """Builder of nodes after the producer of a mask, in order."""

    def __init__(self, graph: onnx_ir.Graph, mask: onnx_ir.Value) -> None:
        self._graph, self._name, self._count = graph, f"{mask.name}/padding", 0
        self._last = mask.producer()

    def weight(self, name: str, array: NDArray[Any] | np.generic) -> onnx_ir.Value:
        """Add an initializer."""
        return add_weight(self._graph, f"{self._name}/{name}", array)

    def cast(
        self, value: onnx_ir.Value, dtype: onnx_ir.DataType, shape: Iterable[Any] | None
    ) -> onnx_ir.Value:
        """Add a Cast."""
        output = self.add("Cast", [value], shape, to=dtype.value)
        output.dtype = dtype
        return output

    def add(
        self, op: str, inputs: list[onnx_ir.Value], shape: Iterable[Any] | None, **attributes: int
    ) -> onnx_ir.Value:
        """Add a node with one float output; return the output."""
        self._count += 1
        node = onnx_ir.node(op, inputs, attributes=attributes, name=f"{self._name}/{op}_{self._count}")
        output = node.outputs[0]
        output.name, output.dtype = f"{node.name}_out", _FLOAT
        output.shape = None if shape is None else onnx_ir.Shape(shape)
        if self._last is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._last, node)
        self._last = node
        return output
