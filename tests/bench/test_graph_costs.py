"""Operations and bytes of small graphs, against what was counted by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from bench.timing.graph_costs import cost_of_graph
from runtime.errors import ExportError
from runtime.manifest import Precision

FLOAT, INT8, INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT8, onnx_ir.DataType.INT64
SIZES = {"batch": 2, "sequence": 5}


def value(name: str, shape: list, dtype: onnx_ir.DataType = FLOAT) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))


def weight(name: str, shape: list, dtype: type = np.float32) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(np.zeros(shape, dtype), name=name)
    made = value(name, shape, tensor.dtype)
    made.const_value = tensor
    return made


def node(op: str, inputs: list, output: onnx_ir.Value, **attributes: int) -> onnx_ir.Node:
    return onnx_ir.node(op, inputs, attributes=attributes, outputs=[output])


def model(inputs: list, outputs: list, nodes: list, weights: list) -> onnx_ir.Model:
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 21})
    return onnx_ir.Model(graph, ir_version=10)


def projection(*, quantized: bool = False) -> onnx_ir.Model:
    """(batch, sequence, 8) × (8, 3)."""
    data, out = value("x", ["batch", "sequence", 8]), value("y", ["batch", "sequence", 3])
    if not quantized:
        w = weight("w", [8, 3])
        return model([data], [out], [node("MatMul", [data, w], out)], [w])
    w, scale = weight("w", [8, 3], np.int8), weight("scale", [])
    q, back = value("q", ["batch", "sequence", 8], INT8), value("d", ["batch", "sequence", 8])
    wide = value("dw", [8, 3])
    nodes = [
        node("QuantizeLinear", [data, scale], q),
        node("DequantizeLinear", [q, scale], back),
        node("DequantizeLinear", [w, scale], wide),
        node("MatMul", [back, wide], out),
    ]
    return model([data], [out], nodes, [w, scale])


def lookup(*, tied: bool = False) -> onnx_ir.Model:
    """Rows of a table of 100 × 8, and its product with itself where the weights are tied."""
    ids, table = value("ids", ["batch", "sequence"], INT64), weight("table", [100, 8])
    rows = value("rows", ["batch", "sequence", 8])
    nodes, outputs = [node("Gather", [table, ids], rows, axis=0)], [rows]
    if tied:
        turned, scores = value("turned", [8, 100]), value("scores", ["batch", "sequence", 100])
        nodes += [node("Transpose", [table], turned), node("MatMul", [rows, turned], scores)]
        outputs = [scores]
    return model([ids], outputs, nodes, [table])


def test_a_product_costs_two_operations_a_multiply_add() -> None:
    cost = cost_of_graph(projection(), Precision.FP32, SIZES)
    assert cost.operations == {Precision.FP32: 2 * (2 * 5) * 8 * 3}
    assert cost.n_bytes == 4 * (2 * 5 * 8 + 8 * 3 + 2 * 5 * 3)


def test_operations_follow_the_sizes() -> None:
    one, eight = (cost_of_graph(projection(), Precision.FP32, {**SIZES, "batch": n}) for n in (1, 8))
    assert eight.n_operations == 8 * one.n_operations
    assert eight.n_bytes < 8 * one.n_bytes  # the weights are read once


def test_quantized_operands_are_counted_as_int8() -> None:
    cost = cost_of_graph(projection(quantized=True), Precision.INT8, SIZES)
    assert cost.operations == {Precision.INT8: 480}
    assert cost.n_bytes == 4 * 2 * 5 * 8 + 8 * 3 + 4 + 4 * 2 * 5 * 3


def test_a_product_that_was_kept_is_counted_as_fp32() -> None:
    cost = cost_of_graph(projection(), Precision.INT8, SIZES)
    assert cost.operations == {Precision.FP32: 480}


def test_bf16_is_the_engine_s_choice() -> None:
    assert cost_of_graph(projection(), Precision.BF16, SIZES).operations == {Precision.BF16: 480}


def test_of_a_table_the_gathered_rows_count() -> None:
    cost = cost_of_graph(lookup(), Precision.FP32, SIZES)
    assert cost.operations == {}
    assert cost.n_bytes == 8 * 10 + 4 * 10 * 8 + 4 * 10 * 8  # ids, rows read, rows written


def test_no_more_rows_are_read_than_there_are() -> None:
    cost = cost_of_graph(lookup(), Precision.FP32, {"batch": 100, "sequence": 100})
    assert cost.n_bytes == 8 * 10_000 + 4 * 100 * 8 + 4 * 10_000 * 8


def test_a_table_that_is_multiplied_too_is_read_whole() -> None:
    cost = cost_of_graph(lookup(tied=True), Precision.FP32, SIZES)
    assert cost.operations == {Precision.FP32: 2 * 10 * 8 * 100}
    assert cost.n_bytes == 8 * 10 + 4 * 100 * 8 + 4 * 10 * 100


def test_a_shape_that_is_not_stated_is_refused() -> None:
    data, out = value("x", ["batch", 8]), onnx_ir.Value(name="y", type=onnx_ir.TensorType(FLOAT))
    w = weight("w", [8, 3])
    with pytest.raises(ExportError, match="shape"):
        cost_of_graph(
            model([data], [out], [node("MatMul", [data, w], out)], [w]), Precision.FP32, {"batch": 1}
        )
