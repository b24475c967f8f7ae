"""Graph editing functions shared by the graph passes: constants, initializers and consumers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

__all__ = ["add_weight", "constant", "drop_unused", "float_like", "producer", "set_weight", "sole_use"]


def constant(value: onnx_ir.Value | None) -> NDArray[Any] | None:
    """Return the array of an initializer; None for any other value."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def add_weight(graph: onnx_ir.Graph, name: str, array: NDArray[Any] | np.generic) -> onnx_ir.Value:
    """Add an initializer to the graph; a number is appended to a name already in use."""
    array = np.asarray(array)
    unique, n = name, 1
    while unique in graph.initializers:
        n += 1
        unique = f"{name}_{n}"
    value = onnx_ir.Value(
        name=unique,
        type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
        shape=onnx_ir.Shape(array.shape),
        const_value=onnx_ir.tensor(array, name=unique),
    )
    graph.register_initializer(value)
    return value


def set_weight(node: onnx_ir.Node, index: int, array: NDArray[Any]) -> None:
    """Replace one node's weight with a new initializer; the old one may be shared with other nodes."""
    old, graph = node.inputs[index], node.graph
    assert old is not None
    assert isinstance(graph, onnx_ir.Graph)
    node.replace_input_with(index, add_weight(graph, f"{old.name}_rescaled", array))


def producer(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """Return the node that computes a value; None for a graph input, an initializer or an absent value."""
    return None if value is None else value.producer()


def sole_use(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """Return the only consumer of a value; None if it has several or is a graph output."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(iter(value.uses())).node


def float_like(node: onnx_ir.Node, name: str, shape: onnx_ir.Shape | Sequence[Any] | None) -> onnx_ir.Value:
    """Set the name, shape and type float32 of a node's output; return the output."""
    output = node.outputs[0]
    output.name, output.dtype = name, onnx_ir.DataType.FLOAT
    output.shape = None if shape is None else onnx_ir.Shape(shape)
    return output


def drop_unused(model: onnx_ir.Model) -> None:
    """Remove nodes and initializers that are no longer used."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
