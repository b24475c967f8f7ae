"""Mark the nodes that centre pixels: 8-bit integers are exact in 16 bits, so these need no FP32.

A tower's first nodes stay FP32 in a 16-bit graph, which triples the bytes of an image's pixels on their way
to the first product.
"""

from __future__ import annotations

import onnx_ir

from export.graphs.edits import constant, producer
from export.graphs.folding import PIXEL_CENTRE

__all__ = ["EXACT", "mark_pixels"]

EXACT = "babeltower.exact_in_16_bits"
"""Metadata of a node whose float values are integers of at most 8 bits."""


def mark_pixels(model: onnx_ir.Model) -> int:
    """Mark each ``Cast(uint8) − 128``, in place; return the number of marked nodes."""
    n_marked = 0
    for node in model.graph:
        cast = producer(node.inputs[0]) if node.op_type == "Sub" else None
        centre = constant(node.inputs[1]) if cast is not None else None
        if cast is None or cast.op_type != "Cast" or centre is None or centre.size != 1:
            continue
        source = cast.inputs[0]
        if source is None or source.dtype is not onnx_ir.DataType.UINT8 or centre != PIXEL_CENTRE:
            continue
        for marked in (cast, node):
            marked.metadata_props[EXACT] = "1"
            n_marked += 1
    return n_marked
