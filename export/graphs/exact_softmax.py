"""Graph pass that makes quantized softmax independent of padding, by summing integers exactly.

A softmax divides by a sum of floats. An engine's order of addition depends on the number of tokens (full SIMD
vectors, then a remainder), so padding changes the last bit of a weight. Quantization occasionally turns that
into a whole step, and a row in a batch differs from the same row alone (by 2e-3 in OpenVINO 2026.4). Here the
exponentials are quantized *before* they are summed, and the division follows the product with the values:

    codes = round(255 · exp(scores − max)),   attention = (codes · values) / Σ codes

The codes are integers up to 255; their sum is exact in FP32 in any order. Each row of weights also uses the
full range of uint8, which a single scale for all rows would not allow.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, float_like, sole_use

__all__ = ["sum_exactly"]


def sum_exactly(model: onnx_ir.Model) -> int:
    """Rewrite, in place, every quantized softmax over a dynamic axis that is multiplied by the values.

    Returns:
        Number of rewritten softmaxes. A softmax whose product stays in float is left unchanged (its rows then
        depend on padding), and so is one over a fixed number of tokens, as in image towers, where the order
        of addition is always the same.
    """
    softmaxes = [node for node in model.graph if node.op_type == "Softmax" and _is_dynamic(node.outputs[0])]
    return sum(_rewrite(model.graph, node) for node in softmaxes)


def _is_dynamic(weights: onnx_ir.Value) -> bool:
    return weights.shape is None or not isinstance(weights.shape[-1], int)


def _rewrite(graph: onnx_ir.Graph, softmax: onnx_ir.Node) -> bool:
    quantize = sole_use(softmax.outputs[0])
    dequantize = sole_use(quantize.outputs[0]) if quantize is not None else None
    product = sole_use(dequantize.outputs[0]) if dequantize is not None else None
    if quantize is None or dequantize is None or product is None or product.op_type != "MatMul":
        return False
    if quantize.op_type != "QuantizeLinear" or quantize.outputs[0].dtype != onnx_ir.DataType.UINT8:
        return False
    name, weights, result = str(softmax.name), softmax.outputs[0], product.outputs[0]
    # 255 · exp(x − max) = exp(x − (max − ln 255)): scale 1 and zero point 0 then give the codes themselves
    axis = add_weight(graph, f"{name}/axis", np.array([-1], np.int64))
    top = add_weight(graph, f"{name}/log_255", np.float32(math.log(255)))

    largest = _node("ReduceMax", [softmax.inputs[0], axis], f"{name}/largest", None)
    below = _node("Sub", [largest.outputs[0], top], f"{name}/below", None)
    shifted = _node("Sub", [softmax.inputs[0], below.outputs[0]], f"{name}/shifted", weights.shape)
    powers = _node("Exp", [shifted.outputs[0]], f"{name}/powers", weights.shape)
    graph.insert_before(softmax, [largest, below, shifted, powers])
    quantize.replace_input_with(0, powers.outputs[0])

    one = add_weight(graph, f"{name}/one", np.float32(1))
    zero = add_weight(graph, f"{name}/zero", np.array(0, np.uint8))
    for node in (quantize, dequantize):
        node.replace_input_with(1, one)
        node.replace_input_with(2, zero)
    total = _node("ReduceSum", [dequantize.outputs[0], axis], f"{name}/total", None)
    graph.insert_after(dequantize, total)
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
