"""Graph pass that packs the query, key and value projections into one INT8 product.

OpenVINO runs one product of triple width faster than three products, and one transpose of all heads faster
than three; for one short text, per-node overhead is a large part of the time. The scale of each of the three
is divided out in the weights, so that all are quantized with step 1, and multiplied back after the products
that use the codes:

    codes = round(x · [Wq/sq, Wk/sk, Wv/sv] + [bq/sq, bk/sk, bv/sv])
    scores = sq·sk · codes_q · codes_kᵀ,   mixed = sv · weights · codes_v

The codes equal those of three separate products, except where a quotient is within one float rounding error
of a half. The heads are transposed as 8-bit codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight, constant, float_like, producer, sole_use

__all__ = ["pack_attention"]

_ROWS, _COLUMNS = (0, 2, 1, 3), (0, 2, 3, 1)
"""Permutations of (batch, tokens, heads, width) to one tokens × width matrix per head, or its transpose."""

_MADE_BY = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Add", "MatMul")


@dataclass(frozen=True, slots=True)
class _Projection:
    """Matched INT8 projection: ``x W + b``, split into heads, transposed, and quantized with ``scale``."""

    x: onnx_ir.Value
    codes: NDArray[np.int8]
    weight_scales: NDArray[np.float32]
    bias: NDArray[np.float32]
    heads: onnx_ir.Shape
    perm: tuple[int, ...]
    scale: np.float32


@dataclass(frozen=True, slots=True)
class _Attention:
    """Matched attention: the two activation products and their three projections."""

    scores: onnx_ir.Node
    mixed: onnx_ir.Node
    query: _Projection
    key: _Projection
    value: _Projection


def pack_attention(model: onnx_ir.Model) -> int:
    """Pack, in place, every attention that uses the exact softmax of ``export.graphs.exact_softmax``.

    Returns:
        Number of rewritten attentions. One with a product in FP32 is left unchanged, and so is one with a
        plain softmax, which the engine fuses.
    """
    found = _attentions(model)
    for attention in found:
        _pack(model.graph, attention)
        _quantize_before_joining(model.graph, attention.mixed)
    return len(found)


def _attentions(model: onnx_ir.Model) -> list[_Attention]:
    """Find the attentions whose query, key and value are projections of the same tensor."""
    scores: dict[onnx_ir.Value, list[tuple[onnx_ir.Node, _Projection, _Projection]]] = defaultdict(list)
    mixed: dict[onnx_ir.Value, list[tuple[onnx_ir.Node, _Projection]]] = defaultdict(list)
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        left, right = (_projection(value) for value in node.inputs)
        if right is None:
            continue
        if left is not None and left.x is right.x and (left.perm, right.perm) == (_ROWS, _COLUMNS):
            scores[left.x].append((node, left, right))
        elif left is None and right.perm == _ROWS and _is_divided(node):
            mixed[right.x].append((node, right))
    return [
        _Attention(scores[x][0][0], mixed[x][0][0], *scores[x][0][1:], mixed[x][0][1])
        for x in scores
        if len(scores[x]) == len(mixed[x]) == 1
    ]


def _projection(value: onnx_ir.Value | None) -> _Projection | None:
    """Match a quantized projection with bias, split into heads, that produces this operand."""
    chain: dict[str, onnx_ir.Node] = {}
    for op in _MADE_BY:
        node = producer(value)
        if node is None or node.op_type != op or sole_use(node.outputs[0]) is None:
            return None
        chain[op], value = node, node.inputs[0]
    weight = producer(chain["MatMul"].inputs[1])
    if value is None or weight is None or weight.op_type != "DequantizeLinear":
        return None
    codes, weight_scales = constant(weight.inputs[0]), constant(weight.inputs[1])
    scale, zero = (constant(part) for part in chain["QuantizeLinear"].inputs[1:])
    bias, heads = constant(chain["Add"].inputs[1]), chain["Reshape"].outputs[0].shape
    if codes is None or weight_scales is None or scale is None or zero is None or bias is None:
        return None
    if zero.dtype != np.int8 or zero.any() or scale.size != 1 or bias.shape != weight_scales.shape:
        return None
    if heads is None or len(heads) != 4 or not all(isinstance(n, int) for n in heads[2:]):
        return None
    perm = tuple(chain["Transpose"].attributes.get_ints("perm", ()))
    return _Projection(value, codes, weight_scales, bias, heads, perm, np.float32(scale.reshape(())))


def _is_divided(product: onnx_ir.Node) -> bool:
    """Return True if a Div follows the product, as in the exact softmax."""
    after = sole_use(product.outputs[0])
    return after is not None and after.op_type == "Div"


def _pack(graph: onnx_ir.Graph, attention: _Attention) -> None:
    parts = (attention.query, attention.key, attention.value)
    steps = _Steps(graph, f"{attention.scores.name}/packed")
    query, key, value = _moved_heads(steps, _packed_codes(steps, parts), attention.query.heads)
    batch, n_heads, tokens, width = (attention.query.heads[i] for i in _ROWS)
    # one transpose serves all three, so the key needs a second one for codes_q · codes_kᵀ
    key = steps.add("Transpose", [key], [batch, n_heads, width, tokens], perm=(0, 1, 3, 2))
    graph.insert_before(attention.scores, steps.nodes)
    attention.scores.replace_input_with(0, query)
    attention.scores.replace_input_with(1, key)
    attention.mixed.replace_input_with(1, value)
    _scale_result(graph, attention.scores, attention.query.scale * attention.key.scale)
    _scale_result(graph, attention.mixed, attention.value.scale)


class _Steps:
    """Builder of new nodes, in order, and their weights."""

    def __init__(self, graph: onnx_ir.Graph, name: str) -> None:
        self.graph, self.name, self.nodes = graph, name, list[onnx_ir.Node]()

    def weight(self, name: str, array: NDArray[Any] | np.generic) -> onnx_ir.Value:
        """Add an initializer, prefixed with the name of the rewrite."""
        return add_weight(self.graph, f"{self.name}/{name}", array)

    def add(
        self, op: str, inputs: Sequence[onnx_ir.Value], shape: Sequence[Any], **given: Any
    ) -> onnx_ir.Value:
        """Append a node with one output; return the output."""
        name = f"{self.name}/{op}_{len(self.nodes)}"
        self.nodes.append(onnx_ir.node(op, inputs, attributes=given, name=name))
        return float_like(self.nodes[-1], f"{name}_out", shape)


def _packed_codes(steps: _Steps, parts: Sequence[_Projection]) -> onnx_ir.Value:
    """Build the packed projection (batch, tokens, 3 × width): integer values, as a fusible Q/DQ pair."""

    def joined(array: Callable[[_Projection], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([array(part) for part in parts], axis=-1)

    codes = joined(lambda part: part.codes)
    shape = [*parts[0].heads[:2], codes.shape[1]]
    weight = [
        steps.weight("int8", codes),
        steps.weight("scale", joined(lambda part: part.weight_scales / part.scale)),
        steps.weight("zero", np.zeros(codes.shape[1], np.int8)),
    ]
    unit = [steps.weight("one", np.float32(1)), steps.weight("none", np.array(0, np.int8))]
    value = steps.add(
        "MatMul", [parts[0].x, steps.add("DequantizeLinear", weight, codes.shape, axis=1)], shape
    )
    value = steps.add(
        "Add", [value, steps.weight("bias", joined(lambda part: part.bias / part.scale))], shape
    )
    value = steps.add("QuantizeLinear", [value, *unit], shape)
    value.dtype = onnx_ir.DataType.INT8
    return steps.add("DequantizeLinear", [value, *unit], shape)


def _moved_heads(steps: _Steps, packed: onnx_ir.Value, heads: onnx_ir.Shape) -> Sequence[onnx_ir.Value]:
    """Transpose and split the packed codes to query, key and value, each (batch, heads, tokens, width)."""
    batch, tokens, n_heads, width = heads
    assert isinstance(n_heads, int)
    cut = steps.weight("cut", np.array([0, 0, 3 * n_heads, width], np.int64))
    value = steps.add("Reshape", [packed, cut], [batch, tokens, 3 * n_heads, width])
    value = steps.add("Transpose", [value], [batch, 3 * n_heads, tokens, width], perm=_ROWS)
    thirds = {"axis": 1, "num_outputs": 3}
    split = onnx_ir.node("Split", [value], attributes=thirds, num_outputs=3, name=f"{steps.name}/Split")
    for i, part in enumerate(split.outputs):
        part.name, part.dtype = f"{split.name}_{i}", onnx_ir.DataType.FLOAT
        part.shape = onnx_ir.Shape([batch, n_heads, tokens, width])
    steps.nodes.append(split)
    return split.outputs


def _scale_result(graph: onnx_ir.Graph, product: onnx_ir.Node, scale: np.float32) -> None:
    result = product.outputs[0]
    name = f"{product.name}/rescale"
    scaled = onnx_ir.node("Mul", [result, add_weight(graph, f"{name}_by", scale)], name=name)
    result.replace_all_uses_with(float_like(scaled, f"{name}_out", result.shape))
    scaled.replace_input_with(0, result)
    graph.insert_after(product, scaled)


def _quantize_before_joining(graph: onnx_ir.Graph, mixed: onnx_ir.Node) -> None:
    """Quantize the attention output before its transpose, which then moves a quarter of the bytes."""
    nodes: dict[str, onnx_ir.Node] = {}
    node = sole_use(mixed.outputs[0])
    for op in ("Mul", "Div", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear"):
        if node is None or node.op_type != op:
            return
        nodes[op], node = node, sole_use(node.outputs[0])
    first, moved = nodes["Transpose"], nodes["Reshape"].outputs[0]
    quantize, dequantize = nodes["QuantizeLinear"], nodes["DequantizeLinear"]
    source = first.inputs[0]
    assert source is not None
    dequantize.outputs[0].replace_all_uses_with(moved)
    quantize.replace_input_with(0, source)
    first.replace_input_with(0, dequantize.outputs[0])
    quantize.outputs[0].shape = dequantize.outputs[0].shape = source.shape
    graph.remove([quantize, dequantize])
    graph.insert_before(first, [quantize, dequantize])
