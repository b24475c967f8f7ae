"""Graph pass that adds a bias within the matrix product, where no later node takes it.

ONNX Runtime's CUDA Gemm starts its sum from the bias, which saves reading and writing the result once more.
It takes matrices, so the tokens of all rows become one axis; to part them again, their number must be fixed,
as in image towers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like, producer, sole_use

__all__ = ["add_biases_within"]


def add_biases_within(model: onnx_ir.Model) -> int:
    """Replace ``x W + b`` by one Gemm, in place, where the tokens of a row are fixed in number.

    Returns:
        Number of replaced products.
    """
    n_replaced = 0
    for add in list(model.graph):
        product = producer(add.inputs[0]) if add.op_type == "Add" else None
        if product is None or product.op_type != "MatMul" or sole_use(product.outputs[0]) is not add:
            continue
        bias, weight = constant(add.inputs[1]), constant(product.inputs[1])
        if bias is None or weight is None or weight.ndim != 2 or bias.shape != weight.shape[1:]:
            continue
        n_replaced += _replace(model.graph, product, add)
    drop_unused(model)
    return n_replaced


def _replace(graph: onnx_ir.Graph, product: onnx_ir.Node, add: onnx_ir.Node) -> bool:
    x, shape = product.inputs[0], add.outputs[0].shape
    if x is None or x.shape is None or shape is None:
        return False
    name, flat, tokens = str(product.name), x, shape[0]
    steps: list[onnx_ir.Node] = []
    is_flat = len(shape) == 2
    if not is_flat:
        if len(shape) != 3 or not isinstance(shape[1], int) or not isinstance(x.shape[2], int):
            return False
        rows = add_weight(graph, f"{name}/flat", np.array([-1, x.shape[2]], np.int64))
        steps.append(onnx_ir.node("Reshape", [x, rows], name=f"{name}/Reshape"))
        tokens = onnx_ir.SymbolicDim(f"{getattr(shape[0], 'value', shape[0])}*{shape[1]}")
        flat = float_like(steps[-1], f"{name}/flat_out", [tokens, x.shape[2]])
    steps.append(onnx_ir.node("Gemm", [flat, product.inputs[1], add.inputs[1]], name=name))
    result = float_like(steps[-1], f"{name}/sum", [tokens, shape[-1]])
    if not is_flat:
        parted = add_weight(graph, f"{name}/parted", np.array([-1, shape[1], shape[2]], np.int64))
        steps.append(onnx_ir.node("Reshape", [result, parted], name=f"{name}/Parted"))
        result = float_like(steps[-1], f"{name}/parted_out", shape)
    graph.insert_before(add, steps)
    add.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    return True
