"""FP16 graphs: the right nodes in half precision, and vectors that stay where they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from precision_models import TOWERS, Batch, batches_of, cosines, graph_of, tower_id, vectors
from sample_models import Exported

from export.graphs import files as graph_files
from export.graphs.matrix_products import PRODUCTS, operations_by_product
from export.precision.activation_ranges import activation_ranges
from export.precision.fp16 import LARGEST_ACTIVATION, HalfReport, Reason, fp16_from_onnx
from runtime.backends import open_backend
from runtime.errors import EngineError, ExportError
from runtime.manifest import Engine, Modality, Precision

HALF, FLOAT = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT


@dataclass(frozen=True)
class Converted:
    source: Path
    target: Path
    batches: Sequence[Batch]
    report: HalfReport


@pytest.fixture(scope="session", params=TOWERS, ids=lambda t: "-".join(map(tower_id, t)))
def converted(
    request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    name, modality = request.param
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    target = tmp_path_factory.mktemp("fp16") / "model.onnx"
    ranges = activation_ranges(source, batches, threads=1)
    return Converted(source, target, batches, fp16_from_onnx(source, target, data_name="w", ranges=ranges))


def test_vectors_agree_with_fp32(converted: Converted) -> None:
    found, expected = (vectors(g, converted.batches) for g in (converted.target, converted.source))
    assert found.dtype == np.float32
    assert cosines(found, expected).min() >= 0.99999
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6


def test_vectors_agree_where_every_operation_rounds_to_a_half(converted: Converted) -> None:
    """ONNX Runtime computes halves in FP32 on a CPU; the reference evaluator does not."""
    rows = {name: array[:3] for name, array in converted.batches[-1].items()}
    found = ReferenceEvaluator(onnx.load(converted.target)).run(["vector"], rows)[0]
    assert cosines(found, vectors(converted.source, [rows])).min() >= 0.9999


def test_every_product_and_weight_is_half_and_types_are_sound(converted: Converted) -> None:
    onnx.checker.check_model(str(converted.target), full_check=True)
    model = onnx_ir.load(converted.target)
    assert converted.report.half_share == 1.0
    assert not converted.report.kept_products
    for node in model.graph:
        if node.op_type in PRODUCTS:
            assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {HALF}
    weights = [v for v in model.graph.initializers.values() if v.const_value.size > 16]
    assert {v.dtype for v in weights} <= {HALF, onnx_ir.DataType.INT64}
    assert converted.report.target_bytes < 0.52 * converted.report.source_bytes


def test_what_stays_fp32_is_little_and_at_the_ends(converted: Converted) -> None:
    assert {node.reason for node in converted.report.kept} <= {Reason.BEFORE, Reason.AFTER, Reason.SUM}
    assert len(converted.report.kept) <= 16
    assert converted.report.n_half >= 60


def test_inputs_and_outputs_keep_names_types_and_order(converted: Converted) -> None:
    source, target = onnx_ir.load(converted.source), onnx_ir.load(converted.target)
    for before, after in (
        (source.graph.inputs, target.graph.inputs),
        (source.graph.outputs, target.graph.outputs),
    ):
        assert [(v.name, v.dtype, v.shape) for v in before] == [(v.name, v.dtype, v.shape) for v in after]
    assert target.opset_imports == source.opset_imports
    assert target.ir_version == source.ir_version
    assert target.metadata_props["babeltower.precision"] == "fp16"


def test_clamps_that_pytorch_applies_only_in_fp16_are_restored(converted: Converted) -> None:
    facts = onnx_ir.load(converted.target).metadata_props
    m2m100 = (facts["babeltower.family"], facts["babeltower.modality"]) == ("nllb-clip", "text")
    assert converted.report.n_clamps == (2 if m2m100 else 0)


def test_openvino_reads_the_graph_and_says_where_it_cannot_compute_in_fp16(converted: Converted) -> None:
    import openvino

    graph = open_backend(Engine.OPENVINO, converted.target, precision=Precision.FP32, threads=1)
    (found,) = graph.run(converted.batches[-1], ["vector"])
    graph.close()
    assert cosines(found, vectors(converted.source, converted.batches[-1:])).min() >= 0.99999
    if "FP16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="does not support fp16 on "):
            open_backend(Engine.OPENVINO, converted.target, precision=Precision.FP16)


def _scaling_graph(path: Path, scale: float, *, metadata: Mapping[str, str] | None = None) -> Path:
    """x (rows, 4) → product → × scale → ÷ scale → product → y (rows, 4)."""
    eye = numpy_helper.from_array(np.eye(4, dtype=np.float32), "eye")
    factor = numpy_helper.from_array(np.float32(scale), "factor")
    steps = [("MatMul", "x", "eye"), ("Mul", "a", "factor"), ("Div", "b", "factor"), ("MatMul", "c", "eye")]
    nodes = [
        helper.make_node(op, [left, right], [output], name=f"{output}/{op}")
        for (op, left, right), output in zip(steps, "abcy", strict=True)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xabcy"]
    graph = helper.make_graph(
        nodes, "scaling", values[:1], values[-1:], [eye, factor], value_info=values[1:-1]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, dict(metadata or {}))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("scale", "kept"), [(100.0, []), (40_000.0, ["b/Mul", "c/Div"])])
def test_only_nodes_near_the_largest_half_stay_fp32(tmp_path: Path, scale: float, kept: list[str]) -> None:
    source, x = _scaling_graph(tmp_path / "source.onnx", scale), np.array([[1, -2, 0.5, 3]], np.float32)
    ranges = activation_ranges(source, [{"x": x}], threads=1)
    assert ranges == pytest.approx({"x": 3, "a": 3, "b": 3 * scale, "c": 3, "y": 3})
    report = fp16_from_onnx(source, tmp_path / "half.onnx", data_name="w", ranges=ranges)
    assert [node.name for node in report.kept if node.reason is Reason.RANGE] == kept
    assert report.half_share == 1.0
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "half.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(found, x, rtol=2e-3)


def test_the_margin_is_a_factor_of_two(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1.0)
    ranges = dict.fromkeys("xacy", 1.0)
    for magnitude, n_kept in ((LARGEST_ACTIVATION, 0), (LARGEST_ACTIVATION + 1, 2)):
        report = fp16_from_onnx(source, tmp_path / "h.onnx", data_name="w", ranges={**ranges, "b": magnitude})
        assert len(report.kept) == n_kept


def test_a_product_that_overflows_stays_fp32_and_is_counted(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1.0)
    ranges = {**dict.fromkeys("xcby", 1.0), "a": 1e6}
    report = fp16_from_onnx(source, tmp_path / "half.onnx", data_name="w", ranges=ranges)
    assert [node.name for node in report.kept_products] == ["a/MatMul"]
    assert report.half_share == 0.5


def test_a_constant_that_a_half_cannot_hold_keeps_its_node(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1e-6)
    report = fp16_from_onnx(source, tmp_path / "half.onnx", data_name="w", ranges=dict.fromkeys("xabcy", 1.0))
    assert [(n.name, n.reason) for n in report.kept] == [
        ("b/Mul", Reason.CONSTANT),
        ("c/Div", Reason.CONSTANT),
    ]


def test_a_clamped_layer_saturates_where_a_half_would_be_infinite(tmp_path: Path) -> None:
    eye = numpy_helper.from_array(np.eye(2, dtype=np.float32), "eye")
    nodes = [
        helper.make_node("MatMul", ["x", "eye"], ["a"], name="encoder.blocks.0.up/MatMul"),
        helper.make_node("Add", ["a", "a"], ["b"], name="encoder.blocks.0/Add"),
        helper.make_node("MatMul", ["b", "eye"], ["y"], name="pool/MatMul"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xaby"]
    graph = helper.make_graph(nodes, "layer", values[:1], values[-1:], [eye], value_info=values[1:-1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"babeltower.family": "nllb-clip", "babeltower.modality": "text"})
    onnx.save(model, tmp_path / "source.onnx")
    report = fp16_from_onnx(
        tmp_path / "source.onnx", tmp_path / "half.onnx", data_name="w", ranges=dict.fromkeys("xaby", 1.0)
    )
    assert report.n_clamps == 1
    half = ReferenceEvaluator(onnx.load(tmp_path / "half.onnx"))
    with np.errstate(over="ignore"):
        (found,) = half.run(None, {"x": np.array([[40_000, -40_000]], np.float32)})
    np.testing.assert_array_equal(found, np.float32(np.float16([[64_504, -64_504]])))


def test_ranges_of_another_graph_are_refused(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1.0)
    with pytest.raises(ExportError, match="do not include activation 'x'"):
        fp16_from_onnx(source, tmp_path / "half.onnx", data_name="w", ranges={"other": 1.0})


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_OVER_BYTES", 1)
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "weight")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy")
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"], name="up/MatMul")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(
        model, tmp_path / "source.onnx", save_as_external_data=True, location="source.data", size_threshold=0
    )
    ranges = activation_ranges(tmp_path / "source.onnx", [{"x": np.ones((2, 64), np.float32)}], threads=1)
    assert ranges == {"x": 1.0, "y": 64.0}
    target = tmp_path / "out" / "half.onnx"
    report = fp16_from_onnx(tmp_path / "source.onnx", target, data_name="half.data", ranges=ranges)
    assert target.with_name("half.data").stat().st_size == 64 * 64 * 2
    assert report.target_bytes == target.stat().st_size + 64 * 64 * 2
    np.testing.assert_array_equal(
        vectors(target, [{"x": np.ones((1, 64), np.float32)}]), np.full((1, 64), 64)
    )


def test_operations_are_counted(exported: Exported) -> None:
    model = onnx_ir.load(graph_of(exported("capivara"), Modality.TEXT))
    counts = {node.name: n for node, n in operations_by_product(model, {"batch": 2, "sequence": 10}).items()}
    width, n_heads = 64, 4
    assert counts["encoder.blocks.0.attention.query/MatMul"] == 2 * 10 * width * width
    assert counts["encoder.blocks.0.attention/MatMul"] == 2 * n_heads * 10 * 10 * (width // n_heads)
    assert counts["pool.projection.0/Gemm"] == 2 * width * 96


def test_activations_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1e30)
    with pytest.raises(ExportError, match="No batches"):
        activation_ranges(source, [])
    with pytest.raises(ExportError, match=r"'b' of .* is not finite"):
        activation_ranges(source, [{"x": np.full((1, 4), 1e30, np.float32)}])


def test_the_largest_of_all_batches_counts(tmp_path: Path) -> None:
    source = _scaling_graph(tmp_path / "source.onnx", 1.0)
    batches = [{"x": np.full((n, 4), -float(n), np.float32)} for n in (1, 5, 2)]
    assert activation_ranges(source, batches)["a"] == 5.0
