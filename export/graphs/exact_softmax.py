"""Attention weights whose sum is exact, so that no engine's order of adding can turn a rounding.

A softmax divides by a sum of floats. How an engine adds them depends on the number of tokens (full vectors,
then a rest), so padding moves the last bit of a weight; quantising turns that into a whole step now and then,
and a row in a batch is no longer the row alone (2e-3 apart in OpenVINO 2026.4). Here the exponentials are
quantised *before* they are added, and the division comes after the product with the values:

    codes = round(255 · exp(scores − max)),   attention = (codes · values) / Σ codes

The codes are whole numbers up to 255; their sum is exact in FP32, whatever the order. Each row of weights
also takes the whole range of uint8, which one scale for all rows would not give it.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, float_like, sole_use

__all__ = ["sum_exactly"]


def sum_exactly(model: onnx_ir.Model) -> int:
    """Rewrite, in place, every softmax over a dynamic axis that is quantised and multiplied by values.

    Returns:
        How many were rewritten. One whose product stays in float is left as it is (its row then depends on
        padding), and so is one over a fixed number of tokens, an image's: it is added in one order always.
    """
    softmaxes = [node for node in model.graph if node.op_type == "Softmax" and _is_dynamic(node.outputs[0])]
    return sum(_rewrite(model.graph, node) for node in softmaxes)


def _is_dynamic(weights: onnx_ir.Value) -> bool:
    return weights.shape is None or not isinstance(weights.shape[-1], int)


def _rewrite(graph: onnx_ir.Graph, softmax: onnx_ir.Node) -> bool:
    quantise = sole_use(softmax.outputs[0])
    dequantise = sole_use(quantise.outputs[0]) if quantise is not None else None
    product = sole_use(dequantise.outputs[0]) if dequantise is not None else None
    if quantise is None or dequantise is None or product is None or product.op_type != "MatMul":
        return False
    if quantise.op_type != "QuantizeLinear" or quantise.outputs[0].dtype != onnx_ir.DataType.UINT8:
        return False
    name, weights, result = str(softmax.name), softmax.outputs[0], product.outputs[0]
    axis = add_weight(graph, f"{name}/axis", np.array([-1], np.int64))
    top = add_weight(graph, f"{name}/log_255", np.float32(math.log(255)))

    largest = _node("ReduceMax", [softmax.inputs[0], axis], f"{name}/largest", None)
    below = _node("Sub", [largest.outputs[0], top], f"{name}/below", None)
    shifted = _node("Sub", [softmax.inputs[0], below.outputs[0]], f"{name}/shifted", weights.shape)
    powers = _node("Exp", [shifted.outputs[0]], f"{name}/powers", weights.shape)
    graph.insert_before(softmax, [largest, below, shifted, powers])
    quantise.replace_input_with(0, powers.outputs[0])

    one = add_weight(graph, f"{name}/one", np.float32(1))
    zero = add_weight(graph, f"{name}/zero", np.array(0, np.uint8))
    for node in (quantise, dequantise):
        node.replace_input_with(1, one)
        node.replace_input_with(2, zero)
    total = _node("ReduceSum", [dequantise.outputs[0], axis], f"{name}/total", None)
    graph.insert_after(dequantise, total)
    divide = _node("Div", [result, total.outputs[0]], f"{name}/divided", result.shape)
    result.replace_all_uses_with(divide.outputs[0])
    divide.replace_input_with(0, result)
    graph.insert_after(product, divide)
    graph.remove(softmax, safe=True)
    return True


def _node(
    op: str, inputs: list[onnx_ir.Value | None], name: str, shape: onnx_ir.Shape | None
) -> onnx_ir.Node:
    attributes = {"keepdims": 1} if op.startswith("Reduce") else {}
    node = onnx_ir.node(op, inputs, attributes=attributes, name=name)
    float_like(node, f"{name}_out", shape)
    return node
