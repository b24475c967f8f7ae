"""Convert a graph's float types: each node computes in one type, with a Cast between different types."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir

__all__ = ["cast_of", "float_values", "halve", "weight_as"]

_FLOAT, _HALF, _BFLOAT = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16
_FLOATS = frozenset({_FLOAT, _HALF, _BFLOAT})
_ANY_INPUT = frozenset({"Cast", "Shape", "Size"})
_FIXED_OUTPUTS = {"LayerNormalization": (1, 2), "SkipLayerNormalization": (1, 2)}
"""Outputs that are FP32 whatever the node's type: a norm's mean and inverse deviation."""

_SUFFIX = {_FLOAT: "fp32", _HALF: "fp16", _BFLOAT: "bf16"}


def float_values(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Return the float inputs and outputs that determine a node's compute type."""
    inputs = () if node.op_type in _ANY_INPUT else node.inputs
    found = (*inputs, *_typed_outputs(node))
    return [value for value in found if value is not None and value.dtype in _FLOATS]


def _typed_outputs(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    fixed = _FIXED_OUTPUTS.get(node.op_type, ())
    return [value for index, value in enumerate(node.outputs) if index not in fixed]


def halve(
    model: onnx_ir.Model, kept: Collection[onnx_ir.Node], dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT16
) -> None:
    """Convert all nodes except ``kept`` to a 16-bit float type, in place.

    Graph inputs and outputs keep their types. FP32 weights of converted nodes are converted lazily, one at a
    time, when the model is saved.

    Args:
        dtype: ``FLOAT16`` or ``BFLOAT16``.
    """
    types = _Types(model.graph)
    for node in list(model.graph):
        if float_values(node):
            types.settle(node, _FLOAT if node in kept else dtype)
    types.restore_outputs()
    types.drop_unused_weights()


class _Types:
    """Converted copies of a graph's values, each created once per type."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.twins: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}

    def settle(self, node: onnx_ir.Node, dtype: onnx_ir.DataType) -> None:
        """Set all float inputs and outputs of a node to one type."""
        if node.op_type not in _ANY_INPUT:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in _FLOATS and value.dtype is not dtype:
                    node.replace_input_with(index, self._twin(value, dtype, node))
        for output in _typed_outputs(node):
            if output.dtype in _FLOATS:
                output.dtype = dtype
                if node.op_type == "Cast":
                    node.attributes["to"] = onnx_ir.AttrInt64("to", dtype.value)

    def restore_outputs(self) -> None:
        """Cast the graph's outputs back to FP32."""
        for index, value in enumerate(self.graph.outputs):
            if value.dtype not in (_HALF, _BFLOAT):
                continue
            name, value.name = value.name, f"{value.name}_{_SUFFIX[value.dtype]}"
            cast = cast_of(value, _FLOAT, str(name))
            self.graph.append(cast)
            self.graph.outputs[index] = cast.outputs[0]

    def drop_unused_weights(self) -> None:
        """Remove weights that only converted nodes used; their converted copies take the names."""
        for (value, _), twin in self.twins.items():
            if value.is_initializer() and not value.uses():
                name = str(value.name)
                del self.graph.initializers[name]
                twin.name = name

    def _twin(self, value: onnx_ir.Value, dtype: onnx_ir.DataType, reader: onnx_ir.Node) -> onnx_ir.Value:
        key = (value, dtype)
        if key not in self.twins:
            name = f"{value.name}_{_SUFFIX[dtype]}"
            if value.const_value is not None:
                self.twins[key] = weight_as(value.const_value, dtype, name)
                self.graph.register_initializer(self.twins[key])
            else:
                cast = cast_of(value, dtype, name)
                self.graph.insert_before(reader, cast)
                self.twins[key] = cast.outputs[0]
        return self.twins[key]


def cast_of(value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    """Create a Cast node whose output is called ``name``."""
    output = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(dtype))
    return onnx_ir.node("Cast", [value], {"to": dtype.value}, outputs=[output], name=f"{name}/Cast")


def weight_as(weight: onnx_ir.TensorProtocol, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Value:
    """Create an initializer of another float type, converted on each read to save memory."""
    shape = onnx_ir.Shape(weight.numpy().shape)
    tensor = onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(weight.numpy().astype(dtype.numpy()), name=name),
        dtype=dtype,
        shape=shape,
        name=name,
    )
    return onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(dtype), const_value=tensor)
