"""Graph pass that fuses activation functions, and the bias before them, into one node each."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, set_weight, sole_use
from export.graphs.fused_norms import CONTRIB

__all__ = ["fuse_activations"]

_QUICK = 1.702
"""Factor of OpenAI's approximation ``x · sigmoid(1.702 x)``."""


def fuse_activations(model: onnx_ir.Model) -> int:
    """Fuse GELU (by erf, tanh or sigmoid) and biased ReLU, in place.

    Returns:
        Number of fused activations.
    """
    n_fused = 0
    for node in list(model.graph):
        match node.op_type:
            case "Erf":
                n_fused += _fuse_erf(model.graph, node)
            case "Tanh":
                n_fused += _fuse_tanh(model.graph, node)
            case "Sigmoid":
                n_fused += _fuse_sigmoid(model.graph, node)
            case "Relu":
                n_fused += _fuse_relu(model.graph, node)
    drop_unused(model)
    return n_fused


def _fuse_erf(graph: onnx_ir.Graph, erf: onnx_ir.Node) -> bool:
    """Match ``x · (1 + erf(x / √2)) · ½`` with its factors in any order."""
    divide = producer(erf.inputs[0])
    if divide is None or divide.op_type not in ("Div", "Mul"):
        return False
    factor = _scalar(divide.inputs[1])
    expected = math.sqrt(2) if divide.op_type == "Div" else math.sqrt(0.5)
    x, plus = divide.inputs[0], sole_use(erf.outputs[0])
    if x is None or factor is None or not math.isclose(factor, expected, rel_tol=1e-5):
        return False
    return _fuse_halved_product(graph, x, plus, "Gelu", "BiasGelu")


def _fuse_tanh(graph: onnx_ir.Graph, tanh: onnx_ir.Node) -> bool:
    """Match ``½ · x · (1 + tanh(√(2/π) (x + 0.044715 x³)))``."""
    outer = producer(tanh.inputs[0])
    plus = sole_use(tanh.outputs[0])
    if outer is None or outer.op_type != "Mul":
        return False
    factor, inner = _scalar_and_value(outer)
    add = producer(inner)
    if factor is None or add is None or add.op_type != "Add":
        return False
    if not math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-4):
        return False
    for x, cubic in (tuple(add.inputs), tuple(reversed(add.inputs))):
        if x is not None and cubic is not None and _is_cubic_term(cubic, x):
            return _fuse_halved_product(graph, x, plus, "FastGelu", "FastGelu")
    return False


def _is_cubic_term(value: onnx_ir.Value, x: onnx_ir.Value) -> bool:
    """Match ``0.044715 · x³``, the power as Pow or as products."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return False
    factor, power = _scalar_and_value(node)
    if factor is None or not math.isclose(factor, 0.044715, rel_tol=1e-4) or power is None:
        return False
    degree, pending = 0, [power]
    while pending:
        part = pending.pop()
        maker = part.producer()
        if part is x:
            degree += 1
        elif maker is not None and maker.op_type == "Mul":
            pending += [value for value in maker.inputs if value is not None]
        elif maker is not None and maker.op_type == "Pow" and maker.inputs[0] is x:
            degree += int(_scalar(maker.inputs[1]) or 0)
        else:
            return False
    return degree == 3


def _fuse_halved_product(
    graph: onnx_ir.Graph, x: onnx_ir.Value, plus: onnx_ir.Node | None, op: str, with_bias: str
) -> bool:
    """Replace ``x · t · ½``, where ``plus`` computes ``t = 1 + …``, by one node."""
    if plus is None or plus.op_type != "Add" or 1.0 not in [_scalar(value) for value in plus.inputs]:
        return False
    factors: list[float] = []
    has_x, value = False, plus.outputs[0]
    for _ in range(2):
        product = sole_use(value)
        if product is None or product.op_type != "Mul":
            return False
        other = next(part for part in product.inputs if part is not value)
        number = _scalar(other)
        if number is not None:
            factors.append(number)
        elif other is x or _is_half_of(other, x, factors):
            has_x = True
        else:
            return False
        value = product.outputs[0]
        if has_x and factors == [0.5]:
            break
    if not has_x or factors != [0.5]:
        return False
    _replace(graph, value, x, op, with_bias)
    return True


def _is_half_of(value: onnx_ir.Value | None, x: onnx_ir.Value, factors: list[float]) -> bool:
    node = producer(value)
    if node is None or node.op_type != "Mul":
        return False
    factor, inner = _scalar_and_value(node)
    if factor is None or inner is not x:
        return False
    factors.append(factor)
    return True


def _fuse_sigmoid(graph: onnx_ir.Graph, sigmoid: onnx_ir.Node) -> bool:
    """Match ``x · sigmoid(1.702 x)``."""
    scale = producer(sigmoid.inputs[0])
    product = sole_use(sigmoid.outputs[0])
    if scale is None or scale.op_type != "Mul" or product is None or product.op_type != "Mul":
        return False
    factor, x = _scalar_and_value(scale)
    if factor is None or x is None or not math.isclose(factor, _QUICK, rel_tol=1e-5):
        return False
    if x not in product.inputs:
        return False
    node = onnx_ir.node("QuickGelu", [x], {"alpha": factor}, domain=CONTRIB, name=str(product.name))
    _put(graph, node, product.outputs[0])
    return True


def _fuse_relu(graph: onnx_ir.Graph, relu: onnx_ir.Node) -> bool:
    """Rewrite ``relu(x + b) W + c`` to ``max(x, −b) W + (c + b W)``: one elementwise node instead of two."""
    add = producer(relu.inputs[0])
    product = sole_use(relu.outputs[0])
    if add is None or add.op_type != "Add" or sole_use(add.outputs[0]) is None:
        return False
    if product is None or product.op_type != "MatMul":
        return False
    then = sole_use(product.outputs[0])
    bias, weight = constant(add.inputs[1]), constant(product.inputs[1])
    offset = constant(then.inputs[1]) if then is not None and then.op_type == "Add" else None
    if then is None or bias is None or weight is None or offset is None or add.inputs[0] is None:
        return False
    below = add_weight(graph, f"{relu.name}/below", (-bias).astype(np.float32))
    node = onnx_ir.node("Max", [add.inputs[0], below], name=str(relu.name))
    set_weight(then, 1, (offset + bias.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32))
    _put(graph, node, relu.outputs[0])
    return True


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Value, x: onnx_ir.Value, op: str, with_bias: str) -> None:
    add = x.producer()
    bias = constant(add.inputs[1]) if add is not None and add.op_type == "Add" else None
    name = str(old.producer().name)  # type: ignore[union-attr]
    if add is not None and bias is not None and bias.ndim == 1:
        node = onnx_ir.node(with_bias, [add.inputs[0], add.inputs[1]], domain=CONTRIB, name=name)
    else:
        node = onnx_ir.node(op, [x], domain=CONTRIB, name=name)
    _put(graph, node, old)


def _put(graph: onnx_ir.Graph, node: onnx_ir.Node, old: onnx_ir.Value) -> None:
    """Insert a node before the producer of ``old`` and let it take the value's place."""
    replaced = producer(old)
    assert replaced is not None
    float_like(node, f"{old.name}/fused", old.shape)
    graph.insert_before(replaced, node)
    old.replace_all_uses_with(node.outputs[0])


def _scalar(value: onnx_ir.Value | None) -> float | None:
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _scalar_and_value(node: onnx_ir.Node) -> tuple[float | None, onnx_ir.Value | None]:
    left, right = node.inputs
    return (_scalar(left), right) if _scalar(left) is not None else (_scalar(right), left)
