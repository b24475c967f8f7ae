"""Graph pass that pools by a mean as one matrix product: sums over a middle axis need cuDNN on a GPU."""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, sole_use

__all__ = ["pool_by_product"]


def pool_by_product(model: onnx_ir.Model) -> int:
    """Replace ``Σ(x · m) / Σ m`` over the tokens by ``(m / Σ m) x``, in place.

    The weights of a row sum to one, so that no sum exceeds the activations' range in FP16.

    Returns:
        Number of replaced means.
    """
    n_replaced = 0
    for divide in list(model.graph):
        if divide.op_type == "Div":
            n_replaced += _replace(model.graph, divide)
    drop_unused(model)
    return n_replaced


def _replace(graph: onnx_ir.Graph, divide: onnx_ir.Node) -> bool:
    total, count = (_sum_over_tokens(value) for value in divide.inputs)
    product = producer(total)
    if count is None or product is None or product.op_type != "Mul" or count not in product.inputs:
        return False
    x = next((value for value in product.inputs if value is not count), None)
    if x is None or x.shape is None or len(x.shape) != 3 or sole_use(product.outputs[0]) is None:
        return False
    rows, tokens, width = x.shape
    name, divisor = str(divide.name), divide.inputs[1]
    assert divisor is not None
    last = add_weight(graph, f"{name}/axis", np.array([1], np.int64))
    column = onnx_ir.node("Unsqueeze", [divisor, last], name=f"{name}/Unsqueeze")
    float_like(column, f"{name}/count", [rows, 1, 1])
    weights = onnx_ir.node("Div", [count, column.outputs[0]], name=f"{name}/weights")
    float_like(weights, f"{name}/shares", [rows, tokens, 1])
    turned = onnx_ir.node("Transpose", [weights.outputs[0]], {"perm": (0, 2, 1)}, name=f"{name}/Transpose")
    float_like(turned, f"{name}/row", [rows, 1, tokens])
    pooled = onnx_ir.node("MatMul", [turned.outputs[0], x], name=f"{name}/MatMul")
    float_like(pooled, f"{name}/pooled", [rows, 1, width])
    flat = onnx_ir.node("Squeeze", [pooled.outputs[0], last], name=name)
    float_like(flat, f"{name}/mean", divide.outputs[0].shape)
    graph.insert_before(divide, [column, weights, turned, pooled, flat])
    divide.outputs[0].replace_all_uses_with(flat.outputs[0])
    return True


def _sum_over_tokens(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Return what is summed over axis 1 without keeping the axis."""
    node = producer(value)
    if node is None or node.op_type != "ReduceSum" or node.attributes.get_int("keepdims", True):
        return None
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.inputs[0] if axes is not None and axes.tolist() == [1] else None
