"""Text towers without padding: equal to the padded graph, by two evaluations of ONNX Runtime's operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from packed_operators import evaluate, packed_attention, remove_padding, restore_padding
from precision_models import batches_of, cosines, graph_of, vectors
from sample_models import NAMES, Exported

from export.graphs.cuda_form import suit_cuda
from export.graphs.fused_norms import CONTRIB
from export.graphs.spelled_packing import spell_out_packing
from export.graphs.token_rows import keep_token_rows
from export.precision.cuda import cuda_from_onnx
from export.precision.simulation import simulated_from_onnx
from export.variants import forms_for
from runtime.errors import ExportError
from runtime.manifest import Engine, Modality, Precision

Inputs = dict[str, np.ndarray]
FIRST_TOKEN = ("nllb-clip", "nllb-siglip-mrl", "altclip")
"""Samples that pool the first token; the others pool the mean."""


def packed(source: Path, target: Path, precision: Precision = Precision.FP32, **named: object) -> Path:
    cuda_from_onnx(source, target, data_name="w", precision=precision, packed_text=True, **named)  # type: ignore[arg-type]
    return target


def spelled_out(source: Path, target: Path) -> Path:
    model = onnx_ir.load(source)
    assert spell_out_packing(model) >= 3
    onnx_ir.save(model, target)
    return target


def mixed(batches: list[Inputs], *, rows: int) -> Inputs:
    """Real texts of every length in one batch."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [
        {
            name: np.pad(array, ((0, 0), (0, longest - array.shape[1])), constant_values=name == "input_ids")
            for name, array in batch.items()
        }
        for batch in batches
    ]
    whole = {name: np.concatenate([batch[name] for batch in padded]) for name in padded[0]}
    chosen = np.random.default_rng(0).permutation(len(whole["input_ids"]))[:rows]
    return {name: array[chosen] for name, array in whole.items()}


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_have_the_vectors_of_padded_ones(name: str, exported: Exported, tmp_path: Path) -> None:
    model = exported(name)
    source = graph_of(model, Modality.TEXT)
    target = spelled_out(packed(source, tmp_path / "packed.onnx"), tmp_path / "model.onnx")
    batches = [dict(batch) for batch in batches_of(model, Modality.TEXT)]
    for given in (mixed(batches, rows=256), mixed(batches, rows=7), batches[0], batches[-1]):
        one = {key: array[:1] for key, array in given.items()}
        for batch in (given, one):
            np.testing.assert_allclose(vectors(target, [batch]), vectors(source, [batch]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_as_described_give_the_same(name: str, exported: Exported, tmp_path: Path) -> None:
    model = exported(name)
    source = graph_of(model, Modality.TEXT)
    graph = onnx.load(str(packed(source, tmp_path / "packed.onnx")))
    given = mixed([dict(batch) for batch in batches_of(model, Modality.TEXT)], rows=12)
    expected = vectors(source, [given])
    np.testing.assert_allclose(evaluate(graph, given)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_are_packed_and_padding_is_removed_once(name: str, exported: Exported) -> None:
    model = onnx_ir.load(graph_of(exported(name), Modality.TEXT))
    report = suit_cuda(model, packed_text=True)
    kinds = Counter(node.op_type for node in model.graph if node.domain == CONTRIB)
    assert kinds["PackedMultiHeadAttention"] == report.fused["packed"] == report.fused["attentions"] > 0
    assert kinds["RemovePadding"] == 1
    assert kinds["RestorePadding"] == (name not in FIRST_TOKEN)
    assert not kinds["MultiHeadAttention"]
    assert not {"Shape", "Expand", "Softmax"} & {node.op_type for node in model.graph}
    remove = next(node for node in model.graph if node.op_type == "RemovePadding")
    assert len(remove.outputs) == 4, "the kernel writes all four outputs"
    parts = ("/query/MatMul", "/key/MatMul", "/value/MatMul")
    products = [node for node in model.graph if str(node.name).endswith(parts)]
    assert len(products) == 3 * kinds["PackedMultiHeadAttention"]
    assert {str((node.outputs[0].shape or ["none"])[0]) for node in products} == {"tokens"}


@pytest.mark.parametrize("name", ["nllb-clip", "capivara", "altclip"])
def test_masks_of_every_pattern_give_the_exported_vectors(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    source = graph_of(exported(name), Modality.TEXT)
    target = spelled_out(packed(source, tmp_path / "packed.onnx"), tmp_path / "model.onnx")
    ids = np.arange(5, 65).reshape(6, 10)
    ids[3, 2:4] = 1  # the padding token itself, inside of a text
    mask = np.ones_like(ids)
    mask[0, 7:] = mask[2, 1:4] = 0
    mask[1, 4] = mask[1, 6:] = mask[4, 1:] = 0
    mask[5, ::2] = 0
    mask[5, 0] = 1
    given = {"input_ids": ids, "attention_mask": mask}
    np.testing.assert_allclose(vectors(target, [given]), vectors(source, [given]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nllb-clip", "capivara", "altclip"])
def test_a_pooled_token_that_is_masked_is_no_vector(name: str, exported: Exported, tmp_path: Path) -> None:
    source = graph_of(exported(name), Modality.TEXT)
    target = spelled_out(packed(source, tmp_path / "packed.onnx"), tmp_path / "model.onnx")
    given = {"input_ids": np.arange(5, 25).reshape(2, 10), "attention_mask": np.ones((2, 10), np.int64)}
    given["attention_mask"][0, 0] = 0
    found, expected = vectors(target, [given]), vectors(source, [given])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-6)
    if name in FIRST_TOKEN:
        assert np.isnan(found[0]).all()
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_to_fp16_keeps_the_vectors(name: str, exported: Exported, tmp_path: Path) -> None:
    source, target = graph_of(exported(name), Modality.TEXT), tmp_path / "model.onnx"
    batches = batches_of(exported(name), Modality.TEXT)
    report = cuda_from_onnx(
        source, target, data_name="w", precision=Precision.FP16, batches=lambda: batches, packed_text=True
    )
    assert report.half is not None
    assert report.half.half_share == 1.0, report.half.kept_products
    half = onnx_ir.DataType.FLOAT16
    contrib = [
        n for n in onnx_ir.load(target).graph if n.op_type in ("RemovePadding", "PackedMultiHeadAttention")
    ]
    assert [node.outputs[0].dtype for node in contrib] == [half] * len(contrib)
    simulated = tmp_path / "simulated.onnx"
    assert simulated_from_onnx(target, simulated, data_name="s") > 20
    cosine = cosines(vectors(simulated, batches), vectors(source, batches))
    assert 0.9999 <= cosine.min() < 1 - 1e-8


def test_the_example_of_the_operators_description() -> None:
    """Three texts of one, two and four tokens, as in the schema of PackedMultiHeadAttention."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    counts = np.array([1, 2, 4], np.int32)
    for tokens, offsets, ends, longest in (remove_padding(x, counts), _spelled(x, counts)):
        assert tokens.reshape(-1).tolist() == [0, 4, 5, 8, 9, 10, 11]
        assert offsets.reshape(-1).tolist() == [0, 4, 5, 8, 9, 10, 11, 1, 2, 3, 6, 7]
        assert ends.tolist() == [0, 1, 3, 7]
        assert longest.tolist() == [4]
        assert offsets.dtype == ends.dtype == longest.dtype == np.int32
        assert restore_padding(tokens, offsets).reshape(-1).tolist() == [0, 0, 0, 0, 4, 5, 0, 0, 8, 9, 10, 11]


def _spelled(x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    node = onnx.helper.make_node(
        "RemovePadding", ["x", "n"], ["tokens", "offsets", "ends", "longest"], domain=CONTRIB, name="r"
    )
    kinds = [onnx.TensorProto.FLOAT, *[onnx.TensorProto.INT32] * 3]
    shapes = [["tokens", x.shape[2]], ["batch", "sequence"], ["ends"], [1]]
    outputs = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in zip(node.output, kinds, shapes, strict=True)
    ]
    given = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "sequence", x.shape[2]]),
        onnx.helper.make_tensor_value_info("n", onnx.TensorProto.INT32, ["batch"]),
    ]
    return _run(onnx.helper.make_graph([node], "g", given, outputs), {"x": x, "n": counts})


def _run(graph: onnx.GraphProto, given: Inputs) -> tuple[np.ndarray, ...]:
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(CONTRIB, 1)]
    model = onnx_ir.serde.deserialize_model(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    )
    spell_out_packing(model)
    data = onnx_ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, given))


@pytest.mark.parametrize("seed", range(4))
def test_each_operator_spelled_out_is_the_described_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, sequence, heads, width = int(rng.integers(1, 9)), int(rng.integers(1, 17)), 4, 32
    counts = rng.integers(1, sequence + 1, batch).astype(np.int32)
    x = rng.standard_normal((batch, sequence, width), dtype=np.float32)
    tokens, offsets, ends, _ = remove_padding(x, counts)
    for found, expected in zip(_spelled(x, counts), remove_padding(x, counts), strict=True):
        np.testing.assert_array_equal(found, expected)
    query, key, value = (rng.standard_normal(tokens.shape, dtype=np.float32) for _ in range(3))
    floats = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["tokens", width]) for n in "qkvr"
    ]
    places = [
        onnx.helper.make_tensor_value_info("o", onnx.TensorProto.INT32, ["batch", "sequence"]),
        onnx.helper.make_tensor_value_info("e", onnx.TensorProto.INT32, ["ends"]),
    ]
    mix = onnx.helper.make_node(
        "PackedMultiHeadAttention",
        ["q", "k", "v", "", "o", "e"],
        ["r"],
        domain=CONTRIB,
        name="a",
        num_heads=heads,
        scale=0.3,
    )
    (mixed_values,) = _run(
        onnx.helper.make_graph([mix], "g", [*floats[:3], *places], floats[3:]),
        {"q": query, "k": key, "v": value, "o": offsets, "e": ends},
    )
    expected = packed_attention(query, key, value, ends, num_heads=heads, scale=0.3)
    np.testing.assert_allclose(mixed_values, expected, rtol=0, atol=2e-6)
    restore = onnx.helper.make_node("RestorePadding", ["q", "o"], ["p"], domain=CONTRIB, name="p")
    padded = onnx.helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["batch", "sequence", width])
    (restored,) = _run(
        onnx.helper.make_graph([restore], "g", [floats[0], places[0]], [padded]), {"q": query, "o": offsets}
    )
    np.testing.assert_array_equal(restored, restore_padding(query, offsets))


@pytest.mark.parametrize("name", ["nllb-clip", "capivara"])
def test_a_packed_tower_keeps_a_part_of_its_vocabulary(name: str, exported: Exported, tmp_path: Path) -> None:
    source = graph_of(exported(name), Modality.TEXT)
    graph = packed(source, tmp_path / "packed.onnx")
    rows = np.concatenate([np.arange(6), np.arange(6, 4_000, 2)])  # special tokens keep their ids
    assert keep_token_rows(graph, rows, data_name="w")
    target = spelled_out(graph, tmp_path / "model.onnx")
    kept = np.array([[2, 400, 90, 1, 1], [6, 8, 1_000, 70, 4]])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole = {"input_ids": rows[kept], "attention_mask": mask}
    part = {"input_ids": kept, "attention_mask": mask}
    np.testing.assert_allclose(vectors(target, [part]), vectors(source, [whole]), rtol=0, atol=1e-6)


def test_what_cannot_be_packed_is_refused(exported: Exported, tmp_path: Path) -> None:
    image = graph_of(exported("nllb-clip"), Modality.IMAGE)
    with pytest.raises(ExportError, match="attention does not mask the padding"):
        packed(image, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"no form in bf16.*Choose fp16"):
        packed(graph_of(exported("nllb-clip"), Modality.TEXT), tmp_path / "m.onnx", Precision.BF16)


def test_packed_text_is_chosen_for_cuda_alone() -> None:
    engines = [Engine.CUDA, Engine.ONNXRUNTIME]
    (form,) = forms_for([Precision.FP16], [Engine.CUDA], installed=engines, packed_text=True)
    assert form.key == "fp16_cuda"
    with pytest.raises(ExportError, match="applies to no variant of this export; add --engine cuda"):
        forms_for([Precision.FP32], [Engine.ONNXRUNTIME], installed=engines, packed_text=True)
    with pytest.raises(ExportError, match="no form in bf16"):
        forms_for([Precision.FP16, Precision.BF16], [Engine.CUDA], installed=engines, packed_text=True)
