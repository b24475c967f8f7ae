"""Graph passes that fuse a residual sum and its layer norm, and the final L2 norm, into one node each."""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, sole_use

__all__ = ["CONTRIB", "fuse_l2_norms", "fuse_skip_norms"]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_TINY = 1e-24
"""Keeps a zero vector from being divided by zero, and changes no other."""


def fuse_skip_norms(model: onnx_ir.Model) -> int:
    """Replace ``LayerNormalization(a + (b + bias))`` by one SkipLayerNormalization, in place.

    The sum is its fourth output where other nodes read it, as in towers that normalize before each sub-layer.

    Returns:
        Number of fused norms.
    """
    n_fused = 0
    for norm in list(model.graph):
        if norm.op_type != "LayerNormalization" or norm.attributes.get_int("axis", -1) not in (-1, 2):
            continue
        add = producer(norm.inputs[0])
        if add is None or add.op_type != "Add" or not _is_residual(add):
            continue
        n_fused += _fuse(model.graph, norm, add)
    drop_unused(model)
    return n_fused


def _is_residual(add: onnx_ir.Node) -> bool:
    left, right = add.inputs
    if left is None or right is None or constant(left) is not None or constant(right) is not None:
        return False
    return (
        left.shape is not None and right.shape is not None and len(left.shape) in (2, 3)
        and list(left.shape) == list(right.shape)
    )  # fmt: skip


def _fuse(graph: onnx_ir.Graph, norm: onnx_ir.Node, add: onnx_ir.Node) -> bool:
    parts = [_with_bias(value) for value in add.inputs if value is not None]
    biased = next((i for i, (_, bias) in enumerate(parts) if bias is not None), 1)
    branch, bias = parts[biased]
    skip = add.inputs[1 - biased]
    total, result = add.outputs[0], norm.outputs[0]
    gamma, beta = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    if skip is None or gamma is None:
        return False
    inputs = [branch, skip, gamma, beta, *([bias] if bias is not None else [])]
    keeps_sum = len(total.uses()) > 1 or total.is_graph_output()
    node = onnx_ir.node(
        "SkipLayerNormalization",
        inputs,
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=4 if keeps_sum else 1,
        name=str(norm.name),
    )
    float_like(node, f"{norm.name}/skip_out", result.shape)
    # the sum must exist before its first reader, and both inputs already do where it was computed
    graph.insert_after(add, node)
    result.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    if keeps_sum:
        for output in node.outputs[1:3]:
            output.name = ""
        summed = node.outputs[3]
        summed.name, summed.dtype, summed.shape = f"{add.name}/sum", onnx_ir.DataType.FLOAT, total.shape
        total.replace_all_uses_with(summed, replace_graph_outputs=True)
    graph.remove(add, safe=True)
    return True


def _with_bias(value: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value | None]:
    """Split ``product + bias`` into its operands; other values are returned with no bias."""
    node = value.producer()
    if node is None or node.op_type != "Add" or sole_use(value) is None:
        return value, None
    bias = constant(node.inputs[1])
    if bias is None or bias.ndim != 1 or node.inputs[0] is None:
        return value, None
    return node.inputs[0], node.inputs[1]


def fuse_l2_norms(model: onnx_ir.Model) -> int:
    """Replace ``x / max(‖x‖₂, ε)`` by one SimplifiedLayerNormalization, in place.

    That node computes ``x · scale / √(mean(x²) + ε)``; the scale is ``1 / √width``.

    Returns:
        Number of fused norms.
    """
    n_fused = 0
    for norm in list(model.graph):
        if norm.op_type != "ReduceL2":
            continue
        clip = sole_use(norm.outputs[0])
        divide = sole_use(clip.outputs[0]) if clip is not None and clip.op_type == "Clip" else None
        x = norm.inputs[0]
        if divide is None or divide.op_type != "Div" or divide.inputs[0] is not x or x is None:
            continue
        width = x.shape[-1] if x.shape is not None else None
        if not isinstance(width, int):
            continue
        scale = add_weight(model.graph, f"{norm.name}/scale", np.full(width, width**-0.5, dtype=np.float32))
        node = onnx_ir.node(
            "SimplifiedLayerNormalization",
            [x, scale],
            {"axis": -1, "epsilon": _TINY, "stash_type": 1},
            name=str(norm.name),
        )
        old = divide.outputs[0]
        float_like(node, str(old.name), old.shape)
        old.name = f"{old.name}/divided"
        model.graph.insert_before(divide, node)
        old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        model.graph.remove([divide, clip, norm], safe=True)  # type: ignore[list-item]
        n_fused += 1
    return n_fused
