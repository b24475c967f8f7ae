"""Graphs that compute in BF16: types, agreement with FP32, and fused nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from precision_models import TOWERS, batches_of, cosines, graph_of, tower_id, vectors
from sample_models import Exported

from export.graphs.matrix_products import PRODUCTS, operations_by_product
from export.precision.fp16 import Reason, bfloat16_from_onnx, fp16_from_onnx, halve_model
from runtime.manifest import Modality

FLOAT, HALF, BFLOAT = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
)


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_towers_compute_in_bf16_and_agree_with_fp32(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    source, target = graph_of(exported(name), modality), tmp_path / "model.onnx"
    report = bfloat16_from_onnx(source, target, data_name="w")
    onnx.checker.check_model(str(target), full_check=True)
    model = onnx_ir.load(target)
    assert model.metadata_props["babeltower.precision"] == "bf16"
    has_conv = any(node.op_type == "Conv" for node in model.graph)
    assert model.opset_imports == ({"": 22} if has_conv else onnx_ir.load(source).opset_imports)
    assert (report.half_share, report.n_clamps, report.kept_products) == (1.0, 0, ())
    assert {node.reason for node in report.kept} <= {Reason.BEFORE, Reason.AFTER, Reason.SUM}
    for node in model.graph:
        if node.op_type in PRODUCTS:
            assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {BFLOAT}
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} <= {
        FLOAT,
        onnx_ir.DataType.INT64,
        onnx_ir.DataType.UINT8,
    }
    rows = {key: array[:3] for key, array in batches_of(exported(name), modality)[-1].items()}
    (found,) = ReferenceEvaluator(onnx.load(target)).run(["vector"], rows)
    assert cosines(found, vectors(source, [rows])).min() >= 0.999


def scaling_graph(path: Path) -> Path:
    """x (rows, 4) → product → × 1e9 → × 1e-9 → product → y (rows, 4)."""
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "eye")]
    weights += [
        numpy_helper.from_array(np.float32(scale), name) for name, scale in (("up", 1e9), ("down", 1e-9))
    ]
    steps = [("MatMul", "x", "eye"), ("Mul", "a", "up"), ("Mul", "b", "down"), ("MatMul", "c", "eye")]
    nodes = [
        helper.make_node(op, [left, right], [output], name=f"{output}/{op}")
        for (op, left, right), output in zip(steps, "abcy", strict=True)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xabcy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[-1:], weights, value_info=values[1:-1])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_magnitudes_that_fp16_cannot_hold_are_bf16(tmp_path: Path) -> None:
    source = scaling_graph(tmp_path / "source.onnx")
    ranges = {"x": 1.0, "a": 1.0, "b": 1e9, "c": 1.0, "y": 1.0}
    assert len(fp16_from_onnx(source, tmp_path / "h.onnx", data_name="w", ranges=ranges).kept) == 2
    report = bfloat16_from_onnx(source, tmp_path / "b.onnx", data_name="w")
    assert (report.kept, report.half_share) == ((), 1.0)
    x = np.array([[1, -2, 0.5, 3]], np.float32)
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "b.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(found, x, rtol=2e-2)


def fused_model() -> onnx_ir.Model:
    """One layer as ONNX Runtime fuses it: packed attention with lengths, norms with the sum, GELU."""
    width, heads = 8, 2
    weights = {
        "qkv": (width, 3 * width),
        "bias": (3 * width,),
        "up": (width, width),
        "up_bias": (width,),
        "gamma": (width,),
        "beta": (width,),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "qkv"], ["packed"], name="qkv"),
        helper.make_node("Reshape", ["packed", "five"], ["five_d"], name="shape"),
        helper.make_node(
            "MultiHeadAttention",
            ["five_d", "", "", "", "lengths"],
            ["attended"],
            name="attention",
            domain="com.microsoft",
            num_heads=heads,
        ),
        helper.make_node(
            "SkipLayerNormalization",
            ["attended", "x", "gamma", "beta", "up_bias"],
            ["normed", "mean", "deviation", "sum"],
            name="norm",
            domain="com.microsoft",
        ),
        helper.make_node("BiasGelu", ["normed", "up_bias"], ["active"], name="gelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["active", "up"], ["y"], name="up"),
    ]
    dims = ["batch", "sequence"]
    shapes = {
        "packed": [*dims, 3 * width],
        "five_d": [*dims, heads, 3, width // heads],
        "attended": [*dims, width],
        "normed": [*dims, width],
        "mean": [*dims, 1],
        "deviation": [*dims, 1],
        "sum": [*dims, width],
        "active": [*dims, width],
    }
    graph = helper.make_graph(
        nodes,
        "layer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [*dims, width]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*dims, width])],
        [
            *(numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()),
            numpy_helper.from_array(np.array([0, 0, heads, 3, width // heads]), "five"),
        ],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return onnx_ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
def test_fused_nodes_are_converted_and_norms_keep_their_statistics(dtype: onnx_ir.DataType) -> None:
    model = fused_model()
    ranges = dict.fromkeys([v.name for n in model.graph for v in n.outputs] + ["x"], 1.0)
    report = halve_model(model, ranges if dtype is HALF else {}, dtype)
    assert not report.kept
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {types[name] for name in ("packed", "attended", "normed", "sum", "active")} == {dtype}
    assert {types["mean"], types["deviation"]} == {FLOAT}
    (attention,) = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert attention.inputs[4] is model.graph.inputs[1]
    assert [value.dtype for value in model.graph.inputs] == [FLOAT, onnx_ir.DataType.INT32]
    assert model.graph.outputs[0].dtype is FLOAT


def test_fused_attention_counts_as_two_products() -> None:
    counts = {
        node.name: n for node, n in operations_by_product(fused_model(), {"batch": 2, "sequence": 5}).items()
    }
    assert counts == {"qkv": 2 * 5 * 8 * 24, "attention": 2 * (2 * 5 * 8) * 5, "up": 2 * 5 * 8 * 8}
