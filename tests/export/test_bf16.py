"""BF16 graphs: half the disk, and the vectors that OpenVINO gives for the FP32 graph under the same hint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from precision_models import TOWERS, batches_of, cosines, graph_of, tower_id
from sample_models import Exported

from export.graphs.matrix_products import PRODUCTS
from export.precision.bf16 import bf16_from_onnx
from runtime.backends import open_backend
from runtime.errors import EngineError
from runtime.manifest import Engine, Modality, Precision

openvino = pytest.importorskip("openvino")
BFLOAT16, FLOAT = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT


def embed(graph: Path, batches: list, precision: Precision) -> np.ndarray:
    backend = open_backend(Engine.OPENVINO, graph, precision=precision, threads=1)
    found = np.concatenate([backend.run(batch, ["vector"])[0] for batch in batches])
    backend.close()
    return found


def computes_in_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_stored_weights_give_the_vectors_of_the_precision_hint(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    source, target = graph_of(exported(name), modality), tmp_path / "model.onnx"
    report = bf16_from_onnx(source, target, data_name="w")
    assert target.stat().st_size == report.target_bytes <= 0.53 * report.source_bytes
    onnx.checker.check_model(str(target), full_check=True)
    batches = batches_of(exported(name), modality)[-2:]
    if not computes_in_bf16():
        pytest.skip("this CPU does not compute in bf16")
    found = embed(target, batches, Precision.BF16)
    np.testing.assert_array_equal(found, embed(source, batches, Precision.BF16))
    cosine = cosines(found, embed(source, batches, Precision.FP32))
    assert (cosine.min() >= 0.997, cosine.mean() >= 0.9995) == (True, True)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6


def test_operands_are_stored_and_the_rest_stays_fp32(exported: Exported, tmp_path: Path) -> None:
    source = graph_of(exported("nllb-siglip-mrl"), Modality.IMAGE)
    report = bf16_from_onnx(source, tmp_path / "model.onnx", data_name="w")
    model = onnx_ir.load(tmp_path / "model.onnx")
    stored = [v for v in model.graph.initializers.values() if v.dtype is BFLOAT16]
    assert len(stored) == report.n_weights > 0
    assert {use.node.op_type for value in stored for use in value.uses()} == {"Cast"}
    for node in model.graph:
        assert all(value.dtype is not BFLOAT16 for value in node.outputs)
        if node.op_type in PRODUCTS:
            assert node.inputs[1].is_initializer() is False
    assert model.metadata_props["babeltower.precision"] == "bf16"


def test_onnxruntime_refuses_bf16_on_a_cpu(exported: Exported, tmp_path: Path) -> None:
    bf16_from_onnx(graph_of(exported("capivara"), Modality.TEXT), tmp_path / "model.onnx", data_name="w")
    with pytest.raises(EngineError, match="does not support bf16 on a CPU"):
        open_backend(Engine.ONNXRUNTIME, tmp_path / "model.onnx", precision=Precision.BF16)
