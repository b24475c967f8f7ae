"""Graph pass of algebraic folding, which leaves fewer operations to quantize and enables fusion.

Each rewrite is exact in real arithmetic, and equal to 1e-5 in FP32:

- the patch convolution over normalised pixels becomes a matrix product over raw uint8 patches, which are
  8-bit values already, so quantizing them is lossless;
- the scale of the attention scores is folded into the query's weights;
- GELU's factors are reordered to the pattern that ONNX Runtime fuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, set_weight, sole_use

__all__ = ["PIXEL_CENTRE", "fold"]

PIXEL_CENTRE = 128.0
"""Offset subtracted from pixels, so that they fit int8 and weight rounding errors multiply small numbers."""

_MOVES_ONLY = frozenset({"Reshape", "Transpose"})


def fold(model: onnx_ir.Model) -> None:
    """Apply all matching rewrites, in place."""
    for node in list(model.graph):
        match node.op_type:
            case "Conv":
                _patches_as_product(model.graph, node)
            case "Mul":
                if not _scale_into_weights(node):
                    _halve_last(node)
            case _:
                pass
    drop_unused(model)


@dataclass(frozen=True, slots=True)
class _Patches:
    """Matched patch embedding: ``conv(pixels · factor + offset)``, flattened to (batch, patches, width)."""

    conv: onnx_ir.Node
    flatten: onnx_ir.Node
    transpose: onnx_ir.Node
    pixels: onnx_ir.Value
    factor: NDArray[np.float64]
    offset: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches vertically and horizontally."""
        assert self.pixels.shape is not None
        height, width = (side for side in self.pixels.shape[2:] if isinstance(side, int))
        return height // self.weight.shape[2], width // self.weight.shape[3]

    def matrix(self) -> NDArray[np.float32]:
        """Return the weights for raw pixels, (patch pixels, width)."""
        # W (p · f + o) = (W f) p + W o: the normalisation's factor goes into the weights
        return (self.weight * self.factor).reshape(len(self.weight), -1).T.astype(np.float32)

    def bias(self) -> NDArray[np.float32]:
        """Return the bias (width,): the output for centred pixels of 0."""
        # with p = q + 128 the constant part is W (o + 128 f), plus the convolution's own bias
        own = constant(self.conv.inputs[2]) if len(self.conv.inputs) > 2 else None
        centre = (self.weight * (self.offset + PIXEL_CENTRE * self.factor)).sum((1, 2, 3))
        total: NDArray[np.float32] = (centre + (0.0 if own is None else own)).astype(np.float32)
        return total


def _patches(conv: onnx_ir.Node) -> _Patches | None:
    """Match a patch embedding over normalised uint8 pixels; None if the pattern differs."""
    shift = _maker(conv.inputs[0], "Add")
    scale = _maker(shift.inputs[0], "Mul") if shift else None
    cast = _maker(scale.inputs[0], "Cast") if scale else None
    flatten = sole_use(conv.outputs[0])
    transpose = sole_use(flatten.outputs[0]) if flatten and flatten.op_type == "Reshape" else None
    if shift is None or scale is None or cast is None or flatten is None or transpose is None:
        return None
    pixels, weight = cast.inputs[0], constant(conv.inputs[1])
    factor, offset = constant(scale.inputs[1]), constant(shift.inputs[1])
    if pixels is None or weight is None or factor is None or offset is None:
        return None
    if pixels.dtype != onnx_ir.DataType.UINT8 or not _is_patchwise(conv, weight.shape):
        return None
    if transpose.op_type != "Transpose" or tuple(transpose.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    return _Patches(
        conv,
        flatten,
        transpose,
        pixels,
        factor.astype(np.float64).reshape(1, -1, 1, 1),
        offset.astype(np.float64).reshape(1, -1, 1, 1),
        weight.astype(np.float64),
    )


def _patches_as_product(graph: onnx_ir.Graph, conv: onnx_ir.Node) -> None:
    """Replace the convolution with a matrix product over flattened uint8 patches."""
    found = _patches(conv)
    if found is None or found.pixels.shape is None:
        return
    name, (rows, columns) = str(conv.name), found.grid
    n_out, n_channels, size_y, size_x = found.weight.shape
    cut = [0, n_channels, rows, size_y, columns, size_x]
    lines = [found.pixels.shape[0], rows * columns, n_channels * size_y * size_x]
    steps: list[onnx_ir.Node] = []

    def step(op: str, value: onnx_ir.Value, *weights: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        node = onnx_ir.node(op, [value, *weights], attributes=attributes, name=f"{name}/{op}_{len(steps)}")
        steps.append(node)
        return node.outputs[0]

    value = step("Reshape", found.pixels, add_weight(graph, f"{name}/cut", np.array(cut, np.int64)))
    value = step("Transpose", value, perm=(0, 2, 4, 1, 3, 5))
    flat = np.array([0, *lines[1:]], np.int64)
    value = step("Reshape", value, add_weight(graph, f"{name}/lines", flat))
    value.dtype, value.shape = onnx_ir.DataType.UINT8, onnx_ir.Shape(lines)
    for node in steps:
        node.outputs[0].dtype = onnx_ir.DataType.UINT8
    value = step("Cast", value, to=onnx_ir.DataType.FLOAT)
    float_like(steps[-1], f"{name}/float", lines)
    value = step("Sub", value, add_weight(graph, f"{name}/centre", np.float32(PIXEL_CENTRE)))
    float_like(steps[-1], f"{name}/centred", lines)
    value = step("MatMul", value, add_weight(graph, f"{name}/matrix", found.matrix()))
    float_like(steps[-1], f"{name}/product", [*lines[:2], n_out])
    steps[-1].name = name
    value = step("Add", value, add_weight(graph, f"{name}/bias", found.bias()))
    float_like(steps[-1], f"{name}/patches", [*lines[:2], n_out])
    graph.insert_before(conv, steps)
    found.transpose.outputs[0].replace_all_uses_with(value)
    graph.remove([found.transpose, found.flatten, conv], safe=True)


def _maker(value: onnx_ir.Value | None, op: str) -> onnx_ir.Node | None:
    """Return the producer of a value if it has this operator type."""
    node = producer(value)
    return node if node is not None and node.op_type == op else None


def _is_patchwise(conv: onnx_ir.Node, shape: tuple[int, ...]) -> bool:
    attributes = conv.attributes
    return (
        len(shape) == 4
        and attributes.get_int("group", 1) == 1
        and tuple(attributes.get_ints("strides", ())) == shape[2:]
        and not any(attributes.get_ints("pads", ()))
        and set(attributes.get_ints("dilations", (1,))) == {1}
    )


def _scale_into_weights(mul: onnx_ir.Node) -> bool:
    """Rewrite ``(x W + b) k`` to ``x (k W) + k b``, also across reshapes and transposes."""
    factor = constant(mul.inputs[1])
    if factor is None or factor.size != 1:
        return False
    linear: list[onnx_ir.Node] = []
    value = mul.inputs[0]
    while value is not None and (node := value.producer()) is not None and sole_use(value) is not None:
        if node.op_type in ("Add", "MatMul"):
            if constant(node.inputs[1]) is None:
                return False
            linear.append(node)
            if node.op_type == "MatMul":
                break
        elif node.op_type not in _MOVES_ONLY:
            return False
        value = node.inputs[0]
    if not linear or linear[-1].op_type != "MatMul":
        return False
    for node in linear:
        weight = constant(node.inputs[1])
        assert weight is not None
        set_weight(node, 1, weight * factor.astype(np.float32).reshape(()))
    assert mul.inputs[0] is not None
    assert mul.graph is not None
    mul.outputs[0].replace_all_uses_with(mul.inputs[0])
    mul.graph.remove(mul, safe=True)
    return True


def _halve_last(mul: onnx_ir.Node) -> None:
    """Rewrite ``x (½ t)`` to ``½ (x t)`` with ``t = 1 + erf(x / √2)``, which is bit-identical."""
    inner = _maker(mul.inputs[1], "Mul")
    if inner is None or sole_use(inner.outputs[0]) is not mul:
        return
    half_value, one_plus = inner.inputs
    half, source = constant(half_value), _maker(one_plus, "Add")
    if half is None or half.size != 1 or float(half.reshape(())) != 0.5:
        return
    if source is None or _maker(source.inputs[0], "Erf") is None:
        return
    inner.replace_input_with(0, mul.inputs[0])
    inner.replace_input_with(1, one_plus)
    mul.replace_input_with(0, inner.outputs[0])
    mul.replace_input_with(1, half_value)
