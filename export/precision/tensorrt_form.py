"""Adapt graphs with Q/DQ nodes to TensorRT's requirements; other engines are unaffected."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from export.graphs.float_types import cast_of

__all__ = ["QUANTIZERS", "suit_tensorrt"]

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})

_HALF_SCALES_OPSET = 19
_LARGEST_UINT8 = 255.0
_MOVES = frozenset({"Reshape", "Transpose"})
_FLOAT, _UINT8 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.UINT8


def suit_tensorrt(model: onnx_ir.Model) -> dict[str, float]:
    """Raise the opset to 19, for FP16 scales and FP8 codes, and cast uint8 inputs before they are moved.

    TensorRT cannot reshape or transpose uint8 tensors.

    Returns:
        Largest magnitude of each tensor that became float.
    """
    graph = model.graph
    graph.opset_imports[""] = max(_HALF_SCALES_OPSET, graph.opset_imports[""])
    floats: list[onnx_ir.Value] = []
    for cast in [node for node in graph if node.op_type == "Cast"]:
        movers: list[onnx_ir.Node] = []
        source = cast.inputs[0]
        while source is not None and source.dtype is _UINT8 and len(source.uses()) == 1:
            mover = source.producer()
            if mover is None or mover.op_type not in _MOVES:
                break
            movers.insert(0, mover)
            source = mover.inputs[0]
        if movers:
            floats += _cast_first(graph, movers, cast)
    return {str(value.name): _LARGEST_UINT8 for value in floats}


def _cast_first(
    graph: onnx_ir.Graph, movers: Sequence[onnx_ir.Node], cast: onnx_ir.Node
) -> list[onnx_ir.Value]:
    """Move a Cast before the preceding reshapes and transposes; return the tensors that became float."""
    source = movers[0].inputs[0]
    assert source is not None
    first = cast_of(source, _FLOAT, f"{source.name}_fp32")
    graph.insert_before(movers[0], first)
    movers[0].replace_input_with(0, first.outputs[0])
    moved = [mover.outputs[0] for mover in movers]
    for value in moved:
        value.dtype = _FLOAT
    cast.outputs[0].replace_all_uses_with(moved[-1])
    graph.remove(cast, safe=True)
    return [first.outputs[0], *moved]
