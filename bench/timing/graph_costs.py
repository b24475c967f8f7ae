"""Cost of a graph: operations of its matrix products, and a lower bound of the bytes moved.

The bound counts every weight once (of an embedding table only the gathered rows), the graph's inputs and its
outputs. Values between the nodes may stay in caches and are not counted. A multiply–add is two operations;
only matrix products count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir

from export.graphs.matrix_products import operations_by_product
from runtime.errors import ExportError
from runtime.manifest import Precision

__all__ = ["GraphCost", "cost_of_graph"]

_MOVES = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Nodes that pass on a tensor's numbers in another type or order."""
_TYPES = {
    onnx_ir.DataType.INT8: Precision.INT8,
    onnx_ir.DataType.UINT8: Precision.INT8,
    onnx_ir.DataType.FLOAT8E4M3FN: Precision.FP8,
}


@dataclass(frozen=True, slots=True)
class GraphCost:
    """Cost of one run of a graph.

    Attributes:
        operations: Operations by the precision in which the products are computed.
        n_bytes: Lower bound of the bytes moved.
    """

    operations: Mapping[Precision, int]
    n_bytes: int

    @property
    def n_operations(self) -> int:
        """Operations of all precisions."""
        return sum(self.operations.values())


def cost_of_graph(model: onnx_ir.Model, precision: Precision, sizes: Mapping[str, int]) -> GraphCost:
    """Count the cost of one run.

    Args:
        precision: Precision of the variant; the engine chooses BF16, and the graph does not show it.
        sizes: Sizes of the dynamic dimensions: ``{"batch": …, "sequence": …}``.

    Raises:
        ExportError: the graph does not state the shapes of a product or a gather.
    """
    operations: dict[Precision, int] = {}
    for node, n in operations_by_product(model, sizes).items():
        computed_in = _precision_of(node, precision)
        operations[computed_in] = operations.get(computed_in, 0) + 2 * n
    ends = (*model.graph.inputs, *model.graph.outputs)
    n_bytes = _weight_bytes(model, sizes) + sum(_n_bytes(value, sizes) for value in ends)
    return GraphCost(operations, n_bytes)


def _precision_of(product: onnx_ir.Node, precision: Precision) -> Precision:
    """Return a product's precision: INT8 and FP16 show in the graph, the rest is the engine's."""
    found = {_quantized_to(value) for value in product.inputs[:2]}
    if len(found) == 1 and (quantized := found.pop()) is not None:
        return quantized
    if product.outputs[0].dtype is onnx_ir.DataType.FLOAT16:
        return Precision.FP16
    return Precision.BF16 if precision is Precision.BF16 else Precision.FP32


def _quantized_to(value: onnx_ir.Value | None) -> Precision | None:
    while value is not None and (node := value.producer()) is not None and node.op_type in _MOVES:
        value = node.inputs[0]
        if node.op_type == "DequantizeLinear" and value is not None and value.dtype in _TYPES:
            return _TYPES[value.dtype]
    return None


def _weight_bytes(model: onnx_ir.Model, sizes: Mapping[str, int]) -> int:
    """Return the bytes of each weight once; of a table that is only gathered from, the used rows."""
    total = 0
    for weight in model.graph.initializers.values():
        whole = _n_bytes(weight, sizes)
        gathers = [_gathers(use, index) for use, index in _uses(weight)]
        if not gathers or not all(gathers):
            total += whole
            continue
        row = whole / max(1, _extents(weight, sizes)[0])
        n_rows = sum(math.prod(_extents(node.inputs[1], sizes)) for node, _ in _uses(weight))
        total += min(whole, round(row * n_rows))
    return total


def _gathers(node: onnx_ir.Node, index: int) -> bool:
    return node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0


def _uses(value: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """Return the nodes that read a weight, directly or after a change of its type."""
    found: list[tuple[onnx_ir.Node, int]] = []
    for node, index in value.uses():
        widened = node.op_type in ("Cast", "DequantizeLinear") and index == 0
        found += _uses(node.outputs[0]) if widened else [(node, index)]
    return found


def _n_bytes(value: onnx_ir.Value, sizes: Mapping[str, int]) -> int:
    if value.dtype is None:
        raise ExportError(f"The graph does not state the type of {value.name!r}; export it again.")
    return math.ceil(math.prod(_extents(value, sizes)) * value.dtype.itemsize)


def _extents(value: onnx_ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    if value is None or value.shape is None:
        name = value.name if value is not None else None
        raise ExportError(f"The graph does not state the shape of {name!r}; export it again.")
    return [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
