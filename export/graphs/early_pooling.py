"""Graph pass that pools one token early: what follows the last attention is computed for that token alone.

A tower that pools its first token needs the last layer's output product, its MLP and the final norm only for
that token; the exported graph computes them for all. Moving the selection before them is exact and saves up
to three quarters of the last layer.
"""

from __future__ import annotations

import onnx_ir

from export.graphs.edits import constant, drop_unused, float_like, producer

__all__ = ["is_by_token", "pool_early", "selects_token"]

_BY_TOKEN = frozenset(
    {"Add", "Clip", "Div", "Erf", "LayerNormalization", "MatMul", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"}
)
"""Operators that compute each token separately, given constants of at most one axis (products: two)."""


def pool_early(model: onnx_ir.Model) -> int:
    """Move every selection of one token towards the inputs, in place.

    Returns:
        Number of nodes that now compute the selected token only.
    """
    moved = 0
    pending = [node for node in model.graph if selects_token(node)]
    whole = _needed_whole(model.graph)
    copies: dict[tuple[onnx_ir.Value, int], onnx_ir.Value] = {}
    while pending:
        gather = pending.pop()
        made = None if gather.inputs[0] in whole else _move(model.graph, gather, copies)
        if made is not None:
            moved += 1
            pending += made
    drop_unused(model)
    return moved


def _needed_whole(graph: onnx_ir.Graph) -> set[onnx_ir.Value]:
    """Return the values that some node reads for all tokens; selecting from these is cheapest."""
    whole = set(graph.outputs)
    for node in reversed(list(graph)):
        if selects_token(node) or (is_by_token(node) and not whole.intersection(node.outputs)):
            continue
        whole.update(value for value in node.inputs if value is not None)
    return whole


def selects_token(node: onnx_ir.Node) -> bool:
    """Return True if a node selects one token of every row."""
    index = constant(node.inputs[1]) if node.op_type == "Gather" else None
    return (
        index is not None
        and index.shape == ()
        and node.attributes.get_int("axis", 0) == 1
        and _rank(node.inputs[0]) == 3
        and node.inputs[0] is not None
        and constant(node.inputs[0]) is None
    )


def _move(
    graph: onnx_ir.Graph, gather: onnx_ir.Node, copies: dict[tuple[onnx_ir.Value, int], onnx_ir.Value]
) -> list[onnx_ir.Node] | None:
    """Swap a selection with the node before it; return the new selections, or None if it must stay."""
    node = producer(gather.inputs[0])
    index = constant(gather.inputs[1])
    if node is None or index is None or not is_by_token(node):
        return None
    made: list[onnx_ir.Node] = []
    inputs: list[onnx_ir.Value | None] = []
    for value in node.inputs:
        if value is None or constant(value) is not None:
            inputs.append(value)
            continue
        key = (value, int(index))
        if key not in copies:
            name = f"{value.name}/token"
            select = onnx_ir.node("Gather", [value, gather.inputs[1]], {"axis": 1}, name=name)
            assert value.shape is not None
            float_like(select, f"{name}_out", [value.shape[0], value.shape[2]])
            graph.insert_before(node, select)
            copies[key] = select.outputs[0]
            made.append(select)
        inputs.append(copies[key])
    twin = onnx_ir.node(node.op_type, inputs, dict(node.attributes), name=f"{node.name}/token")
    float_like(twin, f"{node.name}/token_out", gather.outputs[0].shape)
    graph.insert_before(gather, twin)
    old, new = gather.outputs[0], twin.outputs[0]
    if old.is_graph_output():
        old.name, new.name = f"{old.name}/selected", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for key, value in copies.items():
        if value is old:
            copies[key] = new
    graph.remove(gather, safe=True)
    return made


def is_by_token(node: onnx_ir.Node) -> bool:
    """Return True if a node computes each token from the same token of its inputs and constants."""
    if node.op_type not in _BY_TOKEN or len(node.outputs) != 1:
        return False
    if node.op_type == "LayerNormalization":
        return node.attributes.get_int("axis", -1) in (-1, 2) and _rank(node.inputs[0]) == 3
    for index, value in enumerate(node.inputs):
        array = constant(value)
        most = 2 if node.op_type == "MatMul" else 1
        if array is None and _tokens(value) != _tokens(node.outputs[0]):
            return False  # also where one token's values are repeated for all
        if array is not None and (array.ndim > most or (node.op_type == "MatMul" and index == 0)):
            return False
    if node.op_type == "MatMul":
        return constant(node.inputs[1]) is not None
    return True


def _tokens(value: onnx_ir.Value | None) -> object:
    """Return the number or name of a value's tokens; an object of its own if it has no such axis."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return object()
    return value.shape[1]


def _rank(value: onnx_ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
