"""Matrix products of a graph and their multiply–add counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir

from runtime.errors import ExportError

__all__ = ["NOMINAL_SIZES", "PRODUCTS", "operations_by_product", "products"]

_ATTENTIONS = frozenset({"MultiHeadAttention", "PackedMultiHeadAttention"})

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", *_ATTENTIONS})
"""Operators that multiply matrices; a fused attention (com.microsoft) holds two products."""

NOMINAL_SIZES: Mapping[str, int] = {"batch": 1, "sequence": 16, "tokens": 16}
"""Sizes assumed for dynamic dimensions: one text of about the mean length, one image."""


def products(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    """Iterate over the matrix product nodes, in graph order."""
    return (node for node in model.graph if node.op_type in PRODUCTS)


def operations_by_product(
    model: onnx_ir.Model, sizes: Mapping[str, int] = NOMINAL_SIZES
) -> dict[onnx_ir.Node, int]:
    """Count the multiply–adds of each matrix product, for the given sizes of dynamic dimensions.

    Raises:
        ExportError: the graph does not state the shapes of a product.
    """
    return {node: _operations(node, sizes) for node in products(model)}


def _operations(node: onnx_ir.Node, sizes: Mapping[str, int]) -> int:
    output = math.prod(_shape(node, node.outputs[0], sizes))
    if node.op_type in _ATTENTIONS:
        return 2 * output * _n_keys(node, sizes)
    weight = _shape(node, node.inputs[1], sizes)
    match node.op_type:
        case "Conv":
            return output * math.prod(weight[1:])
        case "Gemm":
            transposed = node.attributes.get_int("transB", 0)
            return output * weight[1 if transposed else 0]
        case _:
            return output * weight[-2]


def _n_keys(node: onnx_ir.Node, sizes: Mapping[str, int]) -> int:
    """Return the number of keys per query; a packed ``query`` holds its own keys.

    Texts without padding are (tokens, width): of one text, every token is a key of each.
    """
    key = node.inputs[1] if len(node.inputs) > 1 else None
    shape = _shape(node, node.inputs[0] if key is None else key, sizes)
    if node.op_type == "PackedMultiHeadAttention":
        return shape[0]
    return shape[2 if len(shape) == 4 else 1]


def _shape(node: onnx_ir.Node, value: onnx_ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    if value is None or value.shape is None:
        raise ExportError(f"Node {node.name!r} has operands without a shape; export the graph again.")
    return [dim if isinstance(dim, int) else _size(str(dim.value), sizes) for dim in value.shape]


def _size(name: str, sizes: Mapping[str, int]) -> int:
    """Return the size of a dynamic dimension, which may be a product such as ``batch*257``."""
    return math.prod(int(part) if part.isdecimal() else sizes[part] for part in name.split("*"))
