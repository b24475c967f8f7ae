"""ONNX Runtime's operators of packed texts for ``onnx.reference``, from their published descriptions.

The descriptions are in the schemas of the package (``get_all_operator_schema``). Nothing is shared with the
code of the exporter, which spells the same operators out for a processor. The other fused operators of a text
tower are here too, so that a packed graph can be evaluated whole.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

__all__ = ["evaluate", "packed_attention", "remove_padding", "restore_padding"]

Array = np.ndarray[Any, Any]


def remove_padding(x: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
    """Rows of tokens; offsets of tokens, then of padding; ends of the texts; the longest text."""
    batch, sequence, _ = x.shape
    tokens = [row * sequence + at for row in range(batch) for at in range(counts[row])]
    padding = [row * sequence + at for row in range(batch) for at in range(counts[row], sequence)]
    offsets = np.array(tokens + padding, np.int32).reshape(batch, sequence)
    ends = np.array([sum(counts[:row]) for row in range(batch + 1)], np.int32)
    packed = np.stack([x[at // sequence, at % sequence] for at in tokens])
    return packed, offsets, ends, np.array([max(counts)], np.int32)


def restore_padding(x: Array, offsets: Array) -> Array:
    """Padded rows, with zeros for padding."""
    batch, sequence = offsets.shape
    padded = np.zeros((batch * sequence, x.shape[1]), x.dtype)
    for row, at in zip(x, offsets.reshape(-1), strict=False):
        padded[at] = row
    return padded.reshape(batch, sequence, -1)


def packed_attention(
    query: Array, key: Array, value: Array, ends: Array, *, num_heads: int, scale: float
) -> Array:
    """Attention of each text over its own tokens."""
    found = np.empty_like(value)
    width = query.shape[1] // num_heads
    for first, last in itertools.pairwise(ends):
        for head in range(num_heads):
            columns = slice(head * width, (head + 1) * width)
            scores = scale * query[first:last, columns] @ key[first:last, columns].T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            found[first:last, columns] = (
                weights / weights.sum(axis=1, keepdims=True) @ value[first:last, columns]
            )
    return found


class RemovePadding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, counts: Array) -> tuple[Array, ...]:
        return remove_padding(x, counts)


class RestorePadding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, offsets: Array) -> tuple[Array, ...]:
        return (restore_padding(x, offsets),)


class PackedMultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        offsets: Array,
        ends: Array,
        num_heads: int | None = None,
        scale: float | None = None,
    ) -> tuple[Array, ...]:
        assert bias is None
        assert num_heads
        width = query.shape[1] // num_heads
        factor = scale or 1 / math.sqrt(width)
        return (packed_attention(query, key, value, ends, num_heads=num_heads, scale=factor),)


class SkipLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        epsilon: float | None = None,
    ) -> tuple[Array, ...]:
        total = x + skip + (0 if bias is None else bias)
        mean = total.mean(axis=-1, keepdims=True)
        variance = np.square(total - mean).mean(axis=-1, keepdims=True)
        normed = (total - mean) / np.sqrt(variance + epsilon) * gamma + (0 if beta is None else beta)
        return normed.astype(x.dtype), mean, variance, total


class SimplifiedLayerNormalization(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        gamma: Array,
        axis: int | None = None,
        epsilon: float | None = None,
        stash_type: int | None = None,
    ) -> tuple[Array, ...]:
        return ((x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * gamma).astype(x.dtype),)


def _gelu(x: Array) -> Array:
    error = np.array([math.erf(v) for v in (x / math.sqrt(2)).reshape(-1).tolist()]).reshape(x.shape)
    return (0.5 * x * (1 + error)).astype(x.dtype)


class Gelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, approximate: str | None = None) -> tuple[Array, ...]:
        return (_gelu(x),)


class BiasGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array, ...]:
        return (_gelu(x + bias),)


def evaluate(model: Any, inputs: dict[str, Array]) -> list[Array]:
    """Return the outputs of a packed graph."""
    for node in model.graph.node:  # the evaluator gives an output without a name to inputs without one
        for index, name in enumerate(node.output):
            node.output[index] = name or f"{node.name}/unused_{index}"
    operators = [
        RemovePadding,
        RestorePadding,
        PackedMultiHeadAttention,
        SkipLayerNormalization,
        SimplifiedLayerNormalization,
        Gelu,
        BiasGelu,
    ]
    found: list[Array] = ReferenceEvaluator(model, new_ops=operators).run(None, inputs)
    return found
