"""Graph pass that repeats constants for each row of a batch without reading the batch's shape.

A class token is the same for every image, repeated to the batch with Shape, Concat and Expand. Shapes are
computed on the processor, between a GPU's kernels. Here a zero is made from a pixel of each image, and the
constant added to it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like

__all__ = ["expand_by_pixels"]


def expand_by_pixels(model: onnx_ir.Model) -> int:
    """Replace, in place, each Expand of a constant to (batch, …) in a graph whose input is ``pixels``.

    Returns:
        Number of replaced nodes.
    """
    pixels = next((value for value in model.graph.inputs if value.name == "pixels"), None)
    if pixels is None or pixels.shape is None:
        return 0
    zero: onnx_ir.Value | None = None
    n_replaced = 0
    for node in list(model.graph):
        token = constant(node.inputs[0]) if node.op_type == "Expand" else None
        shape = node.outputs[0].shape
        if token is None or shape is None or not _repeats_rows(token.shape, shape, pixels.shape[0]):
            continue
        zero = zero or _zero_per_image(model.graph, pixels)
        row = add_weight(model.graph, f"{node.name}/row", token.reshape(1, *list(shape)[1:]))
        add = onnx_ir.node("Add", [zero, row], name=str(node.name))
        float_like(add, f"{node.name}/rows", shape)
        model.graph.insert_before(node, add)
        node.outputs[0].replace_all_uses_with(add.outputs[0])
        n_replaced += 1
    drop_unused(model)
    return n_replaced


def _repeats_rows(found: tuple[int, ...], shape: onnx_ir.Shape, rows: object) -> bool:
    fixed = list(shape)[1:]
    if shape[0] != rows or len(shape) != 3 or not all(isinstance(size, int) for size in fixed):
        return False
    return int(np.prod(found)) == int(np.prod([int(str(size)) for size in fixed]))


def _zero_per_image(graph: onnx_ir.Graph, pixels: onnx_ir.Value) -> onnx_ir.Value:
    """Add nodes that compute a float zero of shape (batch, 1, 1)."""
    assert pixels.shape is not None
    rows = pixels.shape[0]
    starts = add_weight(graph, "zero/starts", np.zeros(3, np.int64))
    ends = add_weight(graph, "zero/ends", np.ones(3, np.int64))
    axes = add_weight(graph, "zero/axes", np.array([1, 2, 3], np.int64))
    cut = onnx_ir.node("Slice", [pixels, starts, ends, axes], name="zero/Slice")
    cut.outputs[0].name, cut.outputs[0].dtype = "zero/pixel", onnx_ir.DataType.UINT8
    cut.outputs[0].shape = onnx_ir.Shape([rows, 1, 1, 1])
    flat_shape = add_weight(graph, "zero/shape", np.array([0, 1, 1], np.int64))
    flat = onnx_ir.node("Reshape", [cut.outputs[0], flat_shape], name="zero/Reshape")
    flat.outputs[0].name, flat.outputs[0].dtype = "zero/flat", onnx_ir.DataType.UINT8
    flat.outputs[0].shape = onnx_ir.Shape([rows, 1, 1])
    cast = onnx_ir.node("Cast", [flat.outputs[0]], {"to": onnx_ir.DataType.FLOAT.value}, name="zero/Cast")
    float_like(cast, "zero/float", [rows, 1, 1])
    zero = onnx_ir.node(
        "Mul", [cast.outputs[0], add_weight(graph, "zero/factor", np.float32(0))], name="zero/Mul"
    )
    graph.insert_before(graph[0], [cut, flat, cast, zero])
    return float_like(zero, "zero/value", [rows, 1, 1])
