"""INT8 graphs: what they hold, what they give, and that a row does not depend on its batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from cpu_needs import computes_here, int8_engine_params
from onnx import TensorProto, helper, save_model
from precision_models import TOWERS, batches_of, cosines, graph_of, tower_id, vectors
from sample_models import Exported

from export.graphs.edits import add_weight
from export.graphs.embedding_table import EmbeddingTable
from export.graphs.folding import fold
from export.onnx_graph import IR_VERSION, OPSET
from export.precision.clipping import ClipMethod
from export.precision.int8 import ActivationEncoding, GraphTarget, Int8Recipe, int8_from_onnx, recipe_for
from runtime.backends import open_backend
from runtime.errors import ExportError
from runtime.machine import has_vnni
from runtime.manifest import Engine, Manifest, Modality, Precision

SYMMETRIC = (ActivationEncoding.INT8, ActivationEncoding.INT8_OR_UINT8)


def quantized(source: Path, folder: Path, batches: list, **options: object) -> tuple[Path, object]:
    target = folder / "model.onnx"
    recipe = Int8Recipe(**options)
    report = int8_from_onnx(source, target, data_name="weights.data", calibration=batches, recipe=recipe)
    return target, report


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_rewrites_before_quantizing_are_exact(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    model = onnx_ir.load(source)
    fold(model)
    onnx_ir.save(model, tmp_path / "folded.onnx")
    assert np.abs(vectors(tmp_path / "folded.onnx", batches) - vectors(source, batches)).max() <= 1e-5


@pytest.mark.parametrize("target", GraphTarget)
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_a_tower_in_int8_is_close_to_fp32(
    name: str, modality: Modality, target: GraphTarget, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    recipe = recipe_for(target)
    report = int8_from_onnx(
        source, tmp_path / "model.onnx", data_name="data", calibration=batches, recipe=recipe
    )
    found, expected = vectors(tmp_path / "model.onnx", batches), vectors(source, batches)
    assert cosines(found, expected).mean() >= 0.99
    assert report.share_int8 >= 0.95
    assert not report.kept


@pytest.mark.parametrize("engine", int8_engine_params())
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_a_row_alone_equals_the_row_in_a_batch(
    name: str, modality: Modality, engine: Engine, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget(engine.value))
    backend = open_backend(engine, graph, precision=Precision.INT8, threads=1)
    batch = {key: array[:7] for key, array in batches[-1].items()}
    together = backend.run(batch, ["vector"])[0]
    alone = [
        backend.run({key: array[i : i + 1] for key, array in batch.items()}, ["vector"])[0][0]
        for i in range(len(together))
    ]
    backend.close()
    assert np.abs(np.stack(alone) - together).max() <= 1e-6


@pytest.mark.parametrize("n_more", [1, 5, 16, 33])
@pytest.mark.parametrize("engine", int8_engine_params())
@pytest.mark.parametrize("name", ["nllb-clip", "capivara"])
def test_padding_changes_no_vector(
    name: str, engine: Engine, n_more: int, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), Modality.TEXT), batches_of(exported(name), Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget(engine.value))
    backend = open_backend(engine, graph, precision=Precision.INT8, threads=1)
    batch = batches[-1]  # the shortest
    text = Manifest.read(exported(name)).text
    assert batch["input_ids"].shape[1] + n_more <= text.context_length
    padded = {
        "input_ids": np.pad(batch["input_ids"], ((0, 0), (0, n_more)), constant_values=text.pad_id),
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (0, n_more))),
    }
    wide, narrow = (backend.run(inputs, ["vector"])[0] for inputs in (padded, batch))
    backend.close()
    assert np.abs(wide - narrow).max() <= 1e-6


def test_openvino_adds_attention_weights_exactly(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget.OPENVINO)
    nodes = list(onnx_ir.load(graph).graph)
    n_softmaxes = sum(node.op_type == "Softmax" for node in onnx_ir.load(source).graph)
    totals = [node for node in nodes if str(node.name).endswith("Softmax/total")]
    assert len(totals) == sum(node.op_type == "Exp" for node in nodes) == n_softmaxes > 0
    assert not any(node.op_type == "Softmax" for node in nodes)
    for total in totals:
        codes = total.inputs[0].producer()
        assert codes.op_type == "DequantizeLinear"
        assert codes.inputs[1].const_value.numpy() == 1
        assert codes.inputs[2].const_value.numpy() == np.uint8(0)


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_the_portable_form_cannot_saturate(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    """Two products of uint8 and a weight's code fit into 16 bits: every CPU gives the same integers.

    The same weights as uint8 (zero point 128) take another kernel, which never saturates.
    """
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    graph, _ = quantized(source, tmp_path, batches)
    model = onnx_ir.load(graph)
    largest = 0
    for node in model.graph:
        codes = node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None
        if codes is not None and str(node.name).endswith("/weight"):
            largest = max(largest, int(np.abs(codes.numpy().astype(int)).max()))
            as_uint8 = [(codes.numpy().astype(int) + 128).astype(np.uint8)]
            as_uint8.append(np.full_like(node.inputs[2].const_value.numpy(), 128, dtype=np.uint8))
            for i, array in zip((0, 2), as_uint8, strict=True):
                node.replace_input_with(i, add_weight(model.graph, f"{node.name}/{i}/uint8", array))
    assert 0 < largest * 2 * 255 < 1 << 15
    onnx_ir.save(model, tmp_path / "uint8.onnx")
    served, wide = (vectors(path, batches, exact=False) for path in (graph, tmp_path / "uint8.onnx"))
    np.testing.assert_array_equal(served, wide)


def test_full_range_weights_would_saturate(exported: Exported, tmp_path: Path) -> None:
    """The emulation that other tests rely on differs from what a CPU without VNNI computes."""
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget.OPENVINO)
    expected = vectors(source, batches)
    exact, served = (cosines(vectors(graph, batches, exact=how), expected).mean() for how in (True, False))
    assert exact >= 0.999
    if has_vnni() is False:
        assert served < exact - 0.001


@pytest.mark.parametrize("target", GraphTarget)
def test_form_of_the_graph(target: GraphTarget, exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source = graph_of(model, Modality.TEXT)
    int8_from_onnx(
        source,
        tmp_path / "model.onnx",
        data_name="data",
        calibration=batches_of(model, Modality.TEXT),
        recipe=recipe_for(target),
    )
    before, after = onnx_ir.load(source), onnx_ir.load(tmp_path / "model.onnx")
    assert (after.ir_version, after.opset_imports[""]) == (IR_VERSION, OPSET)
    assert after.metadata_props == {**before.metadata_props, "babeltower.precision": "int8"}
    for node in after.graph:
        if node.op_type == "QuantizeLinear":
            zero = node.inputs[2].const_value.numpy()
            assert zero.dtype == np.int8 or target is not GraphTarget.TENSORRT
            assert not zero.any() or target is GraphTarget.ONNXRUNTIME
            assert all(use.node.op_type == "DequantizeLinear" for use in node.outputs[0].uses())
        if node.op_type == "MatMul":
            assert [made_by(value).op_type for value in node.inputs] == ["DequantizeLinear"] * 2


def made_by(value: onnx_ir.Value) -> onnx_ir.Node:
    """The node that computed a tensor, before it was moved."""
    node = value.producer()
    while node.op_type in ("Reshape", "Split", "Squeeze", "Transpose"):
        node = node.inputs[0].producer()
    return node


def n_products(graph: Path) -> int:
    return sum(node.op_type in ("MatMul", "Gemm") for node in onnx_ir.load(graph).graph)


@pytest.mark.parametrize("name", ["nllb-clip", "altclip"])
def test_openvino_packs_query_key_and_value(
    name: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, batches = graph_of(exported(name), Modality.TEXT), batches_of(exported(name), Modality.TEXT)
    folders = [tmp_path / "packed", tmp_path / "plain"]
    for folder in folders:
        folder.mkdir()
    packed, report = quantized(source, folders[0], batches, target=GraphTarget.OPENVINO)
    monkeypatch.setattr("export.precision.int8.pack_attention", lambda model: 0)
    plain, expected = quantized(source, folders[1], batches, target=GraphTarget.OPENVINO)
    n_layers = sum(node.op_type == "Softmax" for node in onnx_ir.load(source).graph)
    assert n_products(source) == n_products(plain) == n_products(packed) + 2 * n_layers
    assert report == expected
    found = [vectors(graph, batches) for graph in (packed, plain)]
    assert cosines(*found).min() >= 0.999
    assert cosines(*found).mean() >= 0.9999


@pytest.mark.skipif(
    computes_here(Engine.OPENVINO, Precision.INT8) is not None, reason="OpenVINO's INT8 is not right here"
)
@pytest.mark.parametrize("name", ["nllb-clip", "altclip"])
def test_packed_attention_agrees_in_openvino(
    name: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, batches = graph_of(exported(name), Modality.TEXT), batches_of(exported(name), Modality.TEXT)
    found = []
    for folder in (tmp_path / "packed", tmp_path / "plain"):
        folder.mkdir()
        graph, _ = quantized(source, folder, batches, target=GraphTarget.OPENVINO)
        backend = open_backend(Engine.OPENVINO, graph, precision=Precision.INT8, threads=1)
        found.append(np.concatenate([backend.run(batch, ["vector"])[0] for batch in batches]))
        backend.close()
        monkeypatch.setattr("export.precision.int8.pack_attention", lambda model: 0)
    assert cosines(*found).min() >= 0.999
    assert cosines(*found).mean() >= 0.9999


def test_heads_are_quantized_before_they_are_joined(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget.OPENVINO)
    joined = [n for n in onnx_ir.load(graph).graph if n.name.endswith("attention.out/MatMul")]
    assert joined
    for product in joined:
        assert product.inputs[0].producer().op_type == "Reshape"
        assert made_by(product.inputs[0]).op_type == "DequantizeLinear"


def test_attention_with_a_kept_product_is_not_packed(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    name = "encoder.blocks.0.attention.key/MatMul"
    graph, report = quantized(source, tmp_path, batches, target=GraphTarget.OPENVINO, kept=(name,))
    nodes = [str(node.name) for node in onnx_ir.load(graph).graph]
    assert name in nodes
    assert report.kept == (name,)
    assert not any(node.startswith("encoder.blocks.0.attention/MatMul/packed") for node in nodes)
    assert any(node.startswith("encoder.blocks.1.attention/MatMul/packed") for node in nodes)
    assert cosines(vectors(graph, batches), vectors(source, batches)).mean() >= 0.99


def test_pixels_are_quantized_without_loss(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.IMAGE), batches_of(model, Modality.IMAGE)
    graph, _ = quantized(source, tmp_path, batches, target=GraphTarget.OPENVINO)
    product = next(node for node in onnx_ir.load(graph).graph if node.op_type == "MatMul")
    pixels = product.inputs[0].producer()
    assert pixels.inputs[0].producer().op_type == "Reshape"
    assert pixels.inputs[1].const_value.numpy() == 1


@pytest.mark.parametrize("method", ClipMethod)
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_every_method_quantizes(
    method: ClipMethod, alpha: float | None, exported: Exported, tmp_path: Path
) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph, report = quantized(source, tmp_path, batches, method=method, smooth=alpha, percentile=99.9)
    assert cosines(vectors(graph, batches), vectors(source, batches)).mean() >= 0.97
    assert (report.n_smoothed > 0) is (alpha is not None)


def test_a_kept_product_stays_fp32(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    name = "encoder.blocks.0.down/MatMul"
    graph, report = quantized(source, tmp_path, batches, kept=(name,))
    kept = next(node for node in onnx_ir.load(graph).graph if node.name == name)
    assert kept.inputs[1].const_value.dtype == onnx_ir.DataType.FLOAT
    assert report.kept == (name,)
    assert 0.5 < report.share_int8 < 1


def test_large_weights_lie_beside_the_graph(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graphs.files.EXTERNAL_DATA_OVER_BYTES", 1 << 10)
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches)
    assert (tmp_path / "weights.data").stat().st_size > graph.stat().st_size
    assert cosines(vectors(graph, batches), vectors(source, batches)).mean() >= 0.99


def test_a_convolution_that_is_no_patch_embedding_is_quantized_in_place(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((8, 3, 3, 3)).astype(np.float32)
    tensor = helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["vector"], "conv", pads=[1, 1, 1, 1])],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 8, 6, 6])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    save_model(model, tmp_path / "conv.onnx")
    batches = [{"x": random.standard_normal((2, 3, 6, 6)).astype(np.float32)}]
    found, report = quantized(tmp_path / "conv.onnx", tmp_path, batches)
    expected = vectors(tmp_path / "conv.onnx", batches)
    assert report.share_int8 == 1
    assert np.abs(vectors(found, batches) - expected).max() <= 0.05 * np.abs(expected).max()


def test_faults_are_named(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    with pytest.raises(ExportError, match="matrix products of"):
        quantized(source, tmp_path, batches, kept=("nothing/MatMul",))
    with pytest.raises(ExportError, match="No calibration batches"):
        quantized(source, tmp_path, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 40.0}, "is out of range"),
        ({"smooth": 1.5}, "between 0 and 1"),
        ({"target": GraphTarget.TENSORRT}, "no int8 table lookup"),
    ],
)
def test_an_impossible_recipe_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Int8Recipe(**options)


@pytest.mark.parametrize("engine", int8_engine_params())
@pytest.mark.parametrize("name", ["nllb-clip", "altclip"])
@pytest.mark.parametrize("table", EmbeddingTable)
def test_tables_shrink_and_agree_in_every_engine(
    table: EmbeddingTable, name: str, engine: Engine, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), Modality.TEXT), batches_of(exported(name), Modality.TEXT)
    graph, _ = quantized(source, tmp_path, batches, table=table, target=GraphTarget(engine.value))
    share = graph.stat().st_size / source.stat().st_size
    assert share < {EmbeddingTable.FP32: 1.0, EmbeddingTable.FP16: 0.6, EmbeddingTable.INT8: 0.4}[table]
    backend = open_backend(engine, graph, precision=Precision.INT8, threads=1)
    found = np.concatenate([backend.run(batch, ["vector"])[0] for batch in batches])
    backend.close()
    assert cosines(found, vectors(source, batches)).mean() >= 0.99
