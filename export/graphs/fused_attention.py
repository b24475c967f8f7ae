"""Graph pass that fuses attention into ONNX Runtime's MultiHeadAttention.

Two biases move out of the products, exactly: a key's bias adds the same number to all scores of a query,
which softmax ignores, and a value's bias passes through the weights, whose sum is one, into the output
product.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, set_weight, sole_use
from export.graphs.fused_norms import CONTRIB
from export.graphs.square_bias import SquareBias, mask_of_bias

__all__ = ["Projections", "fuse_attention"]

_BY_HEAD, _KEY_BY_HEAD = (0, 2, 1, 3), (0, 2, 3, 1)
_PARTS_FIRST, _LAST_TWO = (2, 0, 3, 1, 4), (0, 1, 3, 2)


class Projections(str, Enum):
    """How query, key and value are computed from the same tokens.

    ``PACKED`` is one product whose result stays packed, as (batch, tokens, heads, 3, width); ``JOINED`` is
    one product that is split; ``SEPARATE`` are three products.
    """

    PACKED = "packed"
    JOINED = "joined"
    SEPARATE = "separate"


@dataclass(frozen=True, slots=True)
class _Projection:
    """Product ``x W + b`` that makes the query, key or value; ``scale`` multiplies the result."""

    x: onnx_ir.Value
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    n_heads: int
    scale: float


@dataclass(frozen=True, slots=True)
class _Attention:
    """Matched attention: three projections, the padding mask if any, and the joined heads."""

    name: str
    query: _Projection
    key: _Projection
    value: _Projection
    mask: onnx_ir.Value | None
    bias: onnx_ir.Value | None
    joined: onnx_ir.Node


def fuse_attention(model: onnx_ir.Model, projections: Projections = Projections.SEPARATE) -> int:
    """Fuse every attention of the graph, in place.

    Returns:
        Number of fused attentions; one that does not match is left unchanged.
    """
    biases = SquareBias(model.graph)
    found = [match for node in list(model.graph) if node.op_type == "Softmax" and (match := _match(node))]
    for attention in found:
        _fuse(model.graph, attention, projections, biases)
    drop_unused(model)
    return len(found)


def _match(softmax: onnx_ir.Node) -> _Attention | None:
    scores = softmax.inputs[0]
    product = producer(scores)
    mask: onnx_ir.Value | None = None
    bias: onnx_ir.Value | None = None
    if product is not None and product.op_type == "Add":
        bias = product.inputs[1]
        mask = mask_of_bias(bias)
        product = producer(product.inputs[0])
        if mask is None:
            return None
    mixed = sole_use(softmax.outputs[0])
    moved = sole_use(mixed.outputs[0]) if mixed is not None and mixed.op_type == "MatMul" else None
    joined = sole_use(moved.outputs[0]) if moved is not None and moved.op_type == "Transpose" else None
    if product is None or product.op_type != "MatMul" or mixed is None or joined is None or moved is None:
        return None
    if joined.op_type != "Reshape" or _perm(moved) != _BY_HEAD or mixed.inputs[0] is not softmax.outputs[0]:
        return None
    query, key = _projection(product.inputs[0]), _projection(product.inputs[1], is_key=True)
    value = _projection(mixed.inputs[1])
    if query is None or key is None or value is None or value.scale != 1.0:
        return None
    if not query.n_heads == key.n_heads == value.n_heads or key.x is not value.x:
        return None
    return _Attention(str(softmax.name), query, key, value, mask, bias, joined)


def _projection(value: onnx_ir.Value | None, *, is_key: bool = False) -> _Projection | None:
    """Match a product that is split into heads, back from the operand of an attention product."""
    scale = 1.0
    node = producer(value)
    while node is not None and node.op_type == "Mul":
        factor = constant(node.inputs[1])
        if factor is None or factor.size != 1:
            return None
        scale *= float(factor.reshape(()))
        node = producer(node.inputs[0])
    if is_key and node is not None and node.op_type == "Transpose" and _perm(node) == _LAST_TWO:
        node, is_key = producer(node.inputs[0]), False
    if node is not None and node.op_type == "Squeeze":
        return _part_of_joined(node, scale) if not is_key else None
    if node is None or node.op_type != "Transpose" or _perm(node) != (_KEY_BY_HEAD if is_key else _BY_HEAD):
        return None
    return _linear(producer(node.inputs[0]), scale)


def _linear(heads: onnx_ir.Node | None, scale: float) -> _Projection | None:
    """Match ``Reshape(x W + b)`` into (batch, tokens, heads, width)."""
    found = _product_of(heads)
    if found is None or heads is None or heads.outputs[0].shape is None:
        return None
    n_heads = heads.outputs[0].shape[2]
    if len(heads.outputs[0].shape) != 4 or not isinstance(n_heads, int):
        return None
    return _Projection(*found, n_heads, scale)


def _part_of_joined(squeeze: onnx_ir.Node, scale: float) -> _Projection | None:
    """Match one part of a joined product, (batch, tokens, parts, heads, width) with the parts moved first."""
    cut = producer(squeeze.inputs[0])
    moved = producer(cut.inputs[0]) if cut is not None and cut.op_type == "Slice" else None
    if cut is None or moved is None or moved.op_type != "Transpose" or _perm(moved) != _PARTS_FIRST:
        return None
    heads = producer(moved.inputs[0])
    found, start = _product_of(heads), constant(cut.inputs[1])
    shape = heads.outputs[0].shape if heads is not None else None
    if found is None or start is None or shape is None or len(shape) != 5:
        return None
    n_parts, n_heads, width = shape[2], shape[3], shape[4]
    if not isinstance(n_heads, int) or not isinstance(width, int) or not isinstance(n_parts, int):
        return None
    x, weight, bias = found
    at = int(start.reshape(-1)[0]) % n_parts * n_heads * width
    columns = slice(at, at + n_heads * width)
    return _Projection(x, weight[:, columns], None if bias is None else bias[columns], n_heads, scale)


def _product_of(
    reshape: onnx_ir.Node | None,
) -> tuple[onnx_ir.Value, NDArray[np.float32], NDArray[np.float32] | None] | None:
    if reshape is None or reshape.op_type != "Reshape":
        return None
    node, bias = producer(reshape.inputs[0]), None
    if node is not None and node.op_type == "Add":
        bias, node = constant(node.inputs[1]), producer(node.inputs[0])
        if bias is None:
            return None
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    return node.inputs[0], weight, bias


def _fuse(
    graph: onnx_ir.Graph,
    attention: _Attention,
    projections: Projections,
    biases: SquareBias,
) -> None:
    query, key, value = attention.query, attention.key, attention.value
    shares_tokens = query.x is key.x
    layout = projections if shares_tokens else Projections.SEPARATE
    square = None
    if attention.mask is not None and attention.bias is not None:
        square = biases.of_bias(attention.bias, attention.mask)
    before = attention.joined
    out_bias = _bias_after(before.outputs[0])
    steps = _Steps(graph, before, attention.name)
    inputs: list[onnx_ir.Value | None]
    if layout is Projections.SEPARATE:
        scaled = _Projection(query.x, query.weight, query.bias, query.n_heads, query.scale * key.scale)
        unbiased = out_bias is not None
        inputs = [
            steps.product("query", scaled, with_bias=True),
            steps.product("key", key, with_bias=False),
            steps.product("value", value, with_bias=not unbiased),
            None,
        ]
        if out_bias is not None and value.bias is not None:
            _pass_on(value.bias, *out_bias)
        scale = 1.0
    else:
        scale = query.scale * key.scale
        inputs = steps.joined(attention, packed=layout is Projections.PACKED)
    shape = before.outputs[0].shape
    node = onnx_ir.node(
        "MultiHeadAttention",
        _trimmed([*inputs, None, square]),
        {"num_heads": query.n_heads, "scale": scale, "mask_filter_value": -30_000.0},
        domain=CONTRIB,
        name=attention.name,
    )
    float_like(node, f"{attention.name}/attention", shape)
    graph.insert_before(before, node)
    before.outputs[0].replace_all_uses_with(node.outputs[0])


def _bias_after(joined: onnx_ir.Value) -> tuple[onnx_ir.Node, onnx_ir.Node] | None:
    """Return the output product and the sum that adds its bias; a selection of one token may precede them."""
    node = sole_use(joined)
    if node is not None and node.op_type == "Gather":
        node = sole_use(node.outputs[0])
    add = sole_use(node.outputs[0]) if node is not None and node.op_type == "MatMul" else None
    if node is None or add is None or add.op_type != "Add":
        return None
    if constant(node.inputs[1]) is None or constant(add.inputs[1]) is None:
        return None
    return node, add


def _pass_on(bias: NDArray[np.float32], product: onnx_ir.Node, add: onnx_ir.Node) -> None:
    """Add ``bias @ weight`` to the output product's bias."""
    weight, offset = constant(product.inputs[1]), constant(add.inputs[1])
    assert weight is not None
    assert offset is not None
    total = offset + bias.astype(np.float64) @ weight.astype(np.float64)
    set_weight(add, 1, total.astype(np.float32))


class _Steps:
    """Builder of the products before a fused attention."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node, name: str) -> None:
        self.graph, self.before, self.name = graph, before, name

    def product(self, part: str, projection: _Projection, *, with_bias: bool) -> onnx_ir.Value:
        """Add ``x W``, and ``+ b`` if asked; return (batch, tokens, width)."""
        weight = (projection.weight * np.float32(projection.scale)).astype(np.float32)
        value = self._multiply(part, projection.x, weight)
        if not with_bias or projection.bias is None:
            return value
        bias = (projection.bias * np.float32(projection.scale)).astype(np.float32)
        offset = add_weight(self.graph, f"{self.name}/{part}/bias", bias)
        return self._add("Add", part, [value, offset], value.shape)

    def joined(self, attention: _Attention, *, packed: bool) -> list[onnx_ir.Value | None]:
        """Add one product for all three; return the attention's first four inputs, with the biases."""
        parts = (attention.query, attention.key, attention.value)
        weights = [part.weight for part in parts]
        none = np.zeros(weights[0].shape[1], np.float32)
        biases = [none if part.bias is None else part.bias for part in parts]
        n_heads = attention.query.n_heads
        if packed:  # the heads' columns of the three parts lie side by side
            by_head = [weight.reshape(len(weight), n_heads, 1, -1) for weight in weights]
            weight = np.concatenate(by_head, axis=2).reshape(len(weights[0]), -1)
        else:
            weight = np.concatenate(weights, axis=1)
        value = self._multiply("qkv", attention.query.x, np.ascontiguousarray(weight, np.float32))
        bias = add_weight(self.graph, f"{self.name}/qkv/bias", np.concatenate(biases).astype(np.float32))
        assert value.shape is not None
        rows, tokens, width = value.shape[0], value.shape[1], weight.shape[1]
        if packed:
            cut = np.array([0, 0, n_heads, 3, width // (3 * n_heads)], np.int64)
            shape = add_weight(self.graph, f"{self.name}/qkv/heads", cut)
            heads = self._add("Reshape", "qkv", [value, shape], [rows, tokens, *cut[2:].tolist()])
            return [heads, None, None, bias]
        split = onnx_ir.node(
            "Split", [value], {"axis": 2, "num_outputs": 3}, num_outputs=3, name=f"{self.name}/qkv/Split"
        )
        for index, output in enumerate(split.outputs):
            output.name, output.dtype = f"{split.name}_{index}", onnx_ir.DataType.FLOAT
            output.shape = onnx_ir.Shape([rows, tokens, width // 3])
        self.graph.insert_before(self.before, split)
        return [*split.outputs, bias]

    def _multiply(self, part: str, x: onnx_ir.Value, weight: NDArray[np.float32]) -> onnx_ir.Value:
        assert x.shape is not None
        matrix = add_weight(self.graph, f"{self.name}/{part}/weight", weight)
        return self._add("MatMul", part, [x, matrix], [x.shape[0], x.shape[1], weight.shape[1]])

    def _add(
        self, op: str, part: str, inputs: list[onnx_ir.Value], shape: onnx_ir.Shape | list[object] | None
    ) -> onnx_ir.Value:
        node = onnx_ir.node(op, inputs, name=f"{self.name}/{part}/{op}")
        self.graph.insert_before(self.before, node)
        return float_like(node, f"{self.name}/{part}/{op}_out", shape)


def _trimmed(inputs: list[onnx_ir.Value | None]) -> list[onnx_ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs


def _perm(node: onnx_ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))
