"""Graph pass for servers that normalise images themselves: the pixels are recovered exactly.

The towers' graphs take uint8 pixels, in INT8 down to their first product. A server's float32 pixels are 256
values per channel, so rounding the inverse of its normalisation gives back each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight

__all__ = ["take_normalised_images"]


def take_normalised_images(
    model: onnx_ir.Model, *, name: str, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Replace the input ``pixels``, in place, with float32 (batch, 3, height, width) of the same size.

    Args:
        name: Name of the new input.
        mean: Mean of each channel on the scale 0 to 1, as the server subtracts it.
        std: Deviation of each channel, by which the server divides.
    """
    graph = model.graph
    (pixels,) = graph.inputs
    image = onnx_ir.Value(name=name, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=pixels.shape)
    scale, shift = (255 * np.array(values, np.float64).reshape(1, 3, 1, 1) for values in (std, mean))
    steps: list[tuple[str, list[onnx_ir.Value], dict[str, Any]]] = [
        ("Mul", [add_weight(graph, "normalised_images/scale", scale.astype(np.float32))], {}),
        ("Add", [add_weight(graph, "normalised_images/shift", shift.astype(np.float32))], {}),
        ("Round", [], {}),
        (
            "Clip",
            [
                add_weight(graph, f"normalised_images/{end}", np.float32(value))
                for end, value in (("darkest", 0), ("brightest", 255))
            ],
            {},
        ),
        ("Cast", [], {"to": onnx_ir.DataType.UINT8.value}),
    ]
    value, nodes = image, []
    for op_type, operands, attributes in steps:
        node = onnx_ir.node(op_type, [value, *operands], attributes, name=f"normalised_images/{op_type}")
        value = node.outputs[0]
        value.name, value.shape = f"{node.name}_out", pixels.shape
        value.dtype = onnx_ir.DataType.UINT8 if op_type == "Cast" else onnx_ir.DataType.FLOAT
        nodes.append(node)
    pixels.replace_all_uses_with(value)
    graph.insert_before(graph[0], nodes)
    graph.inputs[:] = [image]
