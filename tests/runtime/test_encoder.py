"""The encoder on a repository of two tiny towers: order, batches, widths, encodings, threads and refusals."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageSequence
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Subwords
from typer.testing import CliRunner

import runtime
from runtime import Encoder
from runtime.commands.app import app
from runtime.errors import EngineError, ImageError, InputError, LanguageError, ManifestError
from runtime.manifest import (
    ImagePreprocessing,
    Manifest,
    Modality,
    Precision,
    TextPreprocessing,
    TowerFiles,
    Variant,
    manifest_path,
    record_of_file,
    tower_folder_name,
)
from runtime.zeroshot import Classifier, templates_from_language

DIM, MRL, SIZE = 24, 8, 16
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "um", "gato", "preto", "vermelho", "azul", "verde", "foto", "de"]
_AGREEMENT = {"min_cosine": 0.9999}
PARITY = {
    "reference": "torch",
    "engines": {
        "onnxruntime": {"text": _AGREEMENT, "image": _AGREEMENT, "languages": {"por_Latn": _AGREEMENT}}
    },
}
LANGUAGE_TOKENS = ["eng_Latn", "por_Latn", "zho_Hans"]
ENGINES = ["onnxruntime", "openvino"]


def normalised(graph_nodes, name, output):
    return [*graph_nodes, helper.make_node("LpNormalization", [name], [output], axis=-1, p=2)]


def weights(name, *shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def text_graph():
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask_3d"]),
        helper.make_node("Mul", ["tokens", "mask_3d"], ["own"]),
        helper.make_node("ReduceSum", ["own", "middle"], ["sum"], keepdims=0),
        helper.make_node("MatMul", ["sum", "head"], ["narrow"]),
    ]
    nodes = normalised(normalised(nodes, "sum", "vector"), "narrow", f"vector_{MRL}")
    constants = [
        weights("table", len(WORDS) + len(LANGUAGE_TOKENS), DIM, seed=0),
        weights("head", DIM, MRL, seed=1),
        numpy_helper.from_array(np.array([-1]), "last"),
        numpy_helper.from_array(np.array([1]), "middle"),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    return model_of(nodes, inputs, constants)


def image_graph():
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "spatial"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "project"], ["sum"]),
        helper.make_node("MatMul", ["sum", "head"], ["narrow"]),
    ]
    nodes = normalised(normalised(nodes, "sum", "vector"), "narrow", f"vector_{MRL}")
    constants = [
        weights("project", 3, DIM, seed=2),
        weights("head", DIM, MRL, seed=1),
        numpy_helper.from_array(np.array([2, 3]), "spatial"),
    ]
    return model_of(
        nodes,
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, SIZE, SIZE])],
        constants,
    )


def model_of(nodes, inputs, constants):
    outputs = [
        helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", DIM]),
        helper.make_tensor_value_info(f"vector_{MRL}", TensorProto.FLOAT, ["batch", MRL]),
    ]
    graph = helper.make_graph(nodes, "tower", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_tokenizer(path):
    subwords = Subwords(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    subwords.pre_tokenizer = pre_tokenizers.Whitespace()
    subwords.add_special_tokens([AddedToken(code, special=True) for code in LANGUAGE_TOKENS])
    subwords.save(str(path))


def write_tower(repository, modality, precision, model):
    folder = repository / tower_folder_name("tiny", modality, precision.value)
    (folder / "1").mkdir(parents=True)
    onnx.save(model, folder / "1" / "model.onnx")
    if modality is Modality.TEXT:
        write_tokenizer(folder / "tokenizer.json")
    return TowerFiles(
        model=folder.name,
        version=1,
        graph="model.onnx",
        inputs=("input_ids", "attention_mask") if modality is Modality.TEXT else ("pixels",),
        outputs={str(DIM): "vector", str(MRL): f"vector_{MRL}"},
        opset=18,
        ir_version=10,
        max_batch_size=8,
        files=tuple(record_of_file(repository, p) for p in sorted(folder.rglob("*")) if p.is_file()),
    )


def write_repository(
    repository, *, language_token=True, precisions=(Precision.FP32, Precision.INT8, Precision.BF16)
):
    variants = {}
    for precision in precisions:
        text = write_tower(repository, Modality.TEXT, precision, text_graph())
        image = write_tower(repository, Modality.IMAGE, precision, image_graph())
        tokenizer = f"{text.model}/tokenizer.json"
        variants[precision.value] = Variant(
            precision, tuple(ENGINES), text, image, tokenizer, PARITY, {}, {}, {}, "2026-01-01"
        )
    codes = {code: len(WORDS) + i for i, code in enumerate(LANGUAGE_TOKENS)} if language_token else {}
    manifest = Manifest(
        name="tiny",
        family="nllb-clip",
        architecture="a bag of words",
        dim=DIM,
        mrl_dims=(MRL,),
        fingerprint="f" * 16,
        licence="MIT",
        languages=tuple(LANGUAGE_TOKENS),
        text=TextPreprocessing(12, 1, () if language_token else (0,), (2,), "whitespace", codes),
        image=ImagePreprocessing(
            SIZE, SIZE, "shortest", "bicubic", "resize-convert", "round", (0, 0, 0), (1, 1, 1)
        ),
        source={"checkpoint": "tiny"},
        variants=variants,
    )
    manifest_path(repository / "tiny").write_text(manifest.to_json(), encoding="utf-8")
    return repository / "tiny"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="session")
def model_without_language(tmp_path_factory):
    return write_repository(
        tmp_path_factory.mktemp("no-language"), language_token=False, precisions=(Precision.FP32,)
    )


@pytest.fixture
def own_model(tmp_path):
    """A repository that a test may damage."""
    return write_repository(tmp_path, precisions=(Precision.FP32,))


@pytest.fixture(params=ENGINES)
def encoder(request, model):
    pytest.importorskip(request.param)
    with Encoder.open(model, engine=request.param, threads=1) as encoder:
        yield encoder


@pytest.fixture
def ort_encoder(model):
    with Encoder.open(model, threads=1) as encoder:
        yield encoder


def texts_of_many_lengths(n):
    words = itertools.cycle(WORDS[4:])
    return [" ".join(itertools.islice(words, i * 7 % 15)) for i in range(n)]


def colour(*rgb, size=(20, 20)):
    return Image.new("RGB", size, rgb)


def test_vectors_are_unit_float32_in_order(encoder):
    texts = texts_of_many_lengths(40)
    vectors = encoder.embed_texts(texts, "pt")
    assert vectors.shape == (40, DIM)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([encoder.embed_texts([text], "pt") for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 100_000])
def test_batching_changes_no_vector(encoder, max_batch_tokens):
    texts = texts_of_many_lengths(33)
    vectors = encoder.embed_texts(texts, "pt", max_batch_tokens=max_batch_tokens)
    np.testing.assert_allclose(vectors, encoder.embed_texts(texts, "pt"), atol=1e-6)


def test_languages_beside_a_text_change_nothing(encoder):
    together = encoder.embed_texts(["um gato", "um gato", "um gato"], ["por_Latn", "en", "zh"])
    alone = encoder.embed_texts(["um gato"], "pt-BR")
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_engines_agree(model):
    pytest.importorskip("openvino")
    with Encoder.open(model) as one, Encoder.open(model, engine="openvino") as other:
        texts, images = texts_of_many_lengths(9), [colour(255, 0, 0), colour(3, 200, 9)]
        np.testing.assert_allclose(one.embed_texts(texts, "pt"), other.embed_texts(texts, "pt"), atol=1e-5)
        np.testing.assert_allclose(one.embed_images(images), other.embed_images(images), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_images_keep_their_order_in_every_batch_size(encoder, batch_size):
    images = [colour(i * 20, 255 - i * 20, i) for i in range(11)]
    vectors = encoder.embed_images(images, batch_size=batch_size)
    alone = np.concatenate([encoder.embed_images([image]) for image in images])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)


def test_narrower_vectors_are_heads_of_their_own(encoder):
    full, narrow = encoder.embed_texts(["um gato"], "pt"), encoder.embed_texts(["um gato"], "pt", dim=MRL)
    assert encoder.dims == (MRL, DIM)
    assert narrow.shape == (1, MRL)
    np.testing.assert_allclose(np.linalg.norm(narrow), 1, atol=1e-6)
    cut = full[:, :MRL] / np.linalg.norm(full[:, :MRL])
    assert np.abs(narrow - cut).max() > 0.01
    assert encoder.embed_images([colour(1, 2, 3)], dim=MRL).shape == (1, MRL)


@pytest.mark.parametrize("dim", [0, 1, 7, 16, 25, 1000, -8])
def test_a_width_that_the_model_lacks_is_an_error(ort_encoder, dim):
    with pytest.raises(InputError, match=rf"no vectors of width {dim}; it has \[8, 24\]"):
        ort_encoder.embed_texts(["um"], "pt", dim=dim)
    with pytest.raises(InputError, match="no vectors of width"):
        ort_encoder.embed_images([colour(0, 0, 0)], dim=dim)


@pytest.mark.parametrize(
    ("encoding", "dtype", "width"),
    [("float32", np.float32, DIM), ("int8", np.int8, DIM), ("binary", np.uint8, DIM // 8)],
)
def test_encodings_and_empty_input(ort_encoder, encoding, dtype, width):
    texts = ort_encoder.embed_texts(["um gato", ""], "pt", encoding=encoding)
    images = ort_encoder.embed_images([colour(9, 9, 9)], encoding=encoding)
    assert (texts.dtype, texts.shape) == (dtype, (2, width))
    assert (images.dtype, images.shape) == (dtype, (1, width))
    assert ort_encoder.embed_texts([], encoding=encoding).shape == (0, width)
    assert ort_encoder.embed_texts([], encoding=encoding).dtype == dtype
    assert ort_encoder.embed_images(iter([]), encoding=encoding).shape == (0, width)
    assert ort_encoder.embed_texts([], dim=MRL).shape == (0, MRL)


def test_an_unknown_encoding_is_an_error(ort_encoder):
    with pytest.raises(InputError, match="'float64' is unknown; expected one of"):
        ort_encoder.embed_texts(["um"], "pt", encoding="float64")


def test_stats_count_texts_tokens_padding_cuts_and_images(ort_encoder):
    ort_encoder.embed_texts(["um gato", "um", "gato " * 30], "pt")
    ort_encoder.embed_images([colour(0, 0, 0)])
    stats = ort_encoder.stats
    assert (stats.texts, stats.truncated_texts, stats.images) == (3, 1, 1)
    assert (stats.tokens, stats.padding_tokens) == (4 + 3 + 12, 1)  # the long one runs alone


def test_texts_may_be_a_generator_and_are_read_lazily(ort_encoder):
    read = []

    def corpus():
        for i in range(10_000):
            read.append(i)
            yield f"um gato {i}"

    parts = ort_encoder.iter_texts(corpus(), "pt")
    first = next(parts)
    assert len(read) == len(first) < 10_000
    assert len(first) + sum(len(part) for part in parts) == 10_000


def test_images_are_read_lazily(ort_encoder):
    read = []

    def corpus():
        for i in range(100):
            read.append(i)
            yield colour(i, i, 255)

    parts = ort_encoder.iter_images(corpus(), batch_size=4)
    assert next(parts).shape == (4, DIM)
    assert len(read) == 4


@pytest.mark.parametrize("call", ["embed_texts", "iter_texts"])
def test_a_bare_string_is_no_list(ort_encoder, call):
    with pytest.raises(InputError, match="pass a list of strings"):
        getattr(ort_encoder, call)("um gato", "pt")


def test_a_bad_image_is_named(ort_encoder):
    with pytest.raises(ImageError, match="Image 1 of the batch, 7 bytes, cannot be decoded"):
        ort_encoder.embed_images([colour(0, 0, 0), b"garbage"])
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        ort_encoder.embed_images(["nowhere.png"])


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -1)])
def test_a_batch_size_below_one_is_an_error(ort_encoder, name, value):
    with pytest.raises(InputError, match="expected at least 1"):
        ort_encoder.embed_images([colour(0, 0, 0)], **{name: value})


def test_a_token_budget_below_one_is_an_error(ort_encoder):
    with pytest.raises(InputError, match="max_batch_tokens is 0"):
        ort_encoder.embed_texts(["um"], "pt", max_batch_tokens=0)


def test_a_missing_language_is_an_error_unless_there_is_a_default(model):
    with Encoder.open(model) as encoder, pytest.raises(LanguageError, match="needs the language"):
        encoder.embed_texts(["um gato"])
    with Encoder.open(model, default_language="pt") as encoder:
        np.testing.assert_array_equal(
            encoder.embed_texts(["um gato"]), encoder.embed_texts(["um gato"], "por_Latn")
        )


def test_a_tower_without_language_tokens_needs_no_language(model_without_language):
    with Encoder.open(model_without_language) as encoder:
        np.testing.assert_array_equal(encoder.embed_texts(["um"]), encoder.embed_texts(["um"], "pt"))


def test_towers_are_opened_when_they_are_used(own_model):
    (own_model.parent / "tiny_image_tower_fp32" / "1" / "model.onnx").unlink()
    with Encoder.open(own_model, verify=False) as encoder:
        assert encoder.embed_texts(["um"], "pt").shape == (1, DIM)
        with pytest.raises(EngineError, match=r"model\.onnx is missing"):
            encoder.embed_images([colour(0, 0, 0)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_graph_is_an_error(own_model, engine, damage):
    pytest.importorskip(engine)
    graph = own_model.parent / "tiny_text_tower_fp32" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:700] if damage is None else damage)
    with pytest.raises(ManifestError, match=r"bytes; the manifest says"):
        Encoder.open(own_model, engine=engine)
    with (
        Encoder.open(own_model, engine=engine, verify=False) as encoder,
        pytest.raises(EngineError, match=r"cannot open .*model\.onnx"),
    ):
        encoder.embed_texts(["um"], "pt")


def test_a_changed_file_is_found(own_model):
    graph = own_model.parent / "tiny_image_tower_fp32" / "1" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(ManifestError, match="sha256"):
        Encoder.open(own_model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "tvm"}, EngineError, "Engine 'tvm' is unknown; expected one of"),
        ({"precision": "int4"}, EngineError, "Precision 'int4' is unknown; expected one of"),
        ({"precision": "fp16"}, ManifestError, "has no fp16 variant"),
        ({"default_language": "xx"}, LanguageError, "'xx' is unknown"),
        ({"threads": 0}, EngineError, "threads is 0; expected at least 1"),
        ({"threads": "1"}, EngineError, "threads is '1', of type str; expected a whole number"),
        ({"threads": 99_999}, EngineError, "threads is 99999; expected at most 1024"),
        ({"instances": -1}, EngineError, "instances is -1; expected at least 1"),
        ({"max_pixels": "8"}, InputError, "max_pixels is '8', of type str"),
    ],
)
def test_options_that_do_not_fit_are_errors(model, options, error, message):
    with pytest.raises(error, match=message):
        Encoder.open(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"provider": "XnnpackExecutionProvider"},
            r"'XnnpackExecutionProvider' is not available; this onnxruntime has",
        ),
        ({"precision": "bf16"}, "does not support bf16 on a CPU"),
        ({"engine": "openvino", "provider": "NPU"}, "'NPU' is not available"),
    ],
)
def test_an_engine_that_cannot_is_an_error(model, options, message):
    pytest.importorskip(options.get("engine", "onnxruntime"))
    with Encoder.open(model, **options) as encoder, pytest.raises(EngineError, match=message):
        encoder.embed_texts(["um"], "pt")


def test_a_missing_openvino_is_an_error_with_its_remedy(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with (
        Encoder.open(model, engine="openvino") as encoder,
        pytest.raises(EngineError, match=r"pip install 'babeltower\[openvino\]'"),
    ):
        encoder.embed_texts(["um"], "pt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"'' is not the path of a model\. Pass REPOSITORY/NAME\."),
        (".", r"'\.' is not the path of a model"),
        ("..", r"'\.\.' is not the path of a model"),
        ("/", "'/' is not the path of a model"),
        ("m/x\0", r"'m/x\\x00' is not the path of a model"),
        (None, "The model is None, of type NoneType; expected a path, REPOSITORY/NAME"),
        (5, "The model is 5, of type int; expected a path"),
        (b"m/x", "The model is b'm/x', of type bytes; expected a path"),
    ],
)
def test_what_is_no_path_of_a_model_is_named(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for opened in (Encoder.open, Manifest.read):
        with pytest.raises(ManifestError, match=message):
            opened(path)


def test_a_repository_and_a_manifest_in_place_of_a_model(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    with pytest.raises(ManifestError, match=r"'\.' is not the path of a model. Pass .*, one of \["):
        Encoder.open(".")
    with pytest.raises(ManifestError, match=rf"is a model's manifest. Leave out its suffix: pass {model}\."):
        Encoder.open(f"{model}.babeltower.json")


def test_an_address_is_not_a_path_of_a_model():
    with pytest.raises(ManifestError, match=r"grpc://host/m is an address; expected the path of a model"):
        Manifest.read("grpc://host/m")


def test_a_manifest_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "m.babeltower.json").write_text("{}", encoding="utf-16")
    with pytest.raises(ManifestError, match=r"is not UTF-8 text .*Copy it from the repository again"):
        Manifest.read(tmp_path / "m")


def test_a_missing_model_is_an_error(model):
    with pytest.raises(ManifestError, match="has no model named 'other'"):
        Encoder.open(model.with_name("other"))


def test_a_closed_encoder_says_so(model):
    encoder = Encoder.open(model)
    encoder.embed_texts(["um"], "pt")
    encoder.close()
    encoder.close()
    with pytest.raises(EngineError, match="is closed"):
        encoder.embed_texts(["um"], "pt")
    with pytest.raises(EngineError, match="is closed"):
        encoder.embed_images([colour(0, 0, 0)])


def test_an_overflowing_tower_is_an_error(own_model):
    path = own_model.parent / "tiny_image_tower_fp32" / "1" / "model.onnx"
    graph = onnx.load(path)
    broken = numpy_helper.from_array(np.full((3, DIM), np.inf, np.float32), "project")
    graph.graph.initializer[0].CopyFrom(broken)
    onnx.save(graph, path)
    with (
        Encoder.open(own_model, verify=False) as encoder,
        pytest.raises(EngineError, match="not finite in 2 of 2 rows"),
    ):
        encoder.embed_images([colour(1, 1, 1), colour(2, 2, 2)])


def test_an_encoder_serves_several_threads(encoder):
    texts = texts_of_many_lengths(30)
    expected = encoder.embed_texts(texts, "pt")
    barrier = threading.Barrier(6)

    def embed(_):
        barrier.wait()
        return encoder.embed_texts(texts, "pt")

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(embed, range(6)):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert encoder.stats.texts == 7 * 30


FIRST_RUNS = """
import sys, threading
from runtime import Encoder

start = threading.Barrier(2)
with Encoder.open(sys.argv[1], engine=sys.argv[2], threads=1, verify=False) as encoder:
    def embed():
        start.wait()
        encoder.embed_texts(["um gato"], "pt")
    threads = [threading.Thread(target=embed) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_very_first_runs_may_be_two_at_once(model, engine):
    """OpenVINO's bindings hang in one of ten such starts if two threads are the first to meet numpy there."""
    pytest.importorskip(engine)
    for _ in range(4):
        subprocess.run([sys.executable, "-c", FIRST_RUNS, str(model), engine], check=True, timeout=120)


def test_properties_come_from_the_manifest(ort_encoder, model):
    assert ort_encoder.manifest == Manifest.read(model)
    assert (ort_encoder.dim, ort_encoder.fingerprint) == (DIM, "f" * 16)


def test_zero_shot_finds_the_label_of_an_image(ort_encoder):
    classifier = Classifier.from_labels(ort_encoder, ["vermelho", "azul", "verde"], language="pt")
    red = colour(255, 0, 0)
    vector = ort_encoder.embed_images([red])
    rigged = dataclasses.replace(classifier, vectors=np.stack([vector[0], -vector[0], classifier.vectors[2]]))
    ((best, second),) = rigged.classify([red], k=2)
    assert best.label == "vermelho"
    assert best.cosine == pytest.approx(1, abs=1e-5)
    assert best.probability > second.probability
    assert sum(p.probability for p in rigged.classify([red], k=9)[0]) == pytest.approx(1)


def test_zero_shot_averages_the_templates(ort_encoder):
    found = Classifier.from_labels(
        ort_encoder, ["gato"], language="pt", templates=["foto de {}", "{} azul"]
    ).vectors
    mean = ort_encoder.embed_texts(["foto de gato", "gato azul"], "pt").mean(axis=0)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "at least one class name"),
        ("gato", {}, "at least one class name"),
        (["a", "a"], {}, "more than once"),
        (["a"], {"templates": ["no braces"]}, "exactly once"),
        (["a"], {"templates": []}, "exactly once"),
        (["a"], {"language": "ace_Arab"}, "no prompt templates in ace_Arab"),
    ],
)
def test_zero_shot_refuses_what_it_cannot_do(ort_encoder, labels, options, message):
    with pytest.raises(InputError, match=message):
        Classifier.from_labels(ort_encoder, labels, **{"language": "pt", **options})


@pytest.mark.parametrize("language", ["en", "pt", "zh-TW", "ar", "hi", "ja", "ko", "ru", "tr", "sw"])
def test_templates_hold_the_label_once(language):
    assert all(template.count("{}") == 1 for template in templates_from_language(language))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    colour(255, 0, 0).save(folder / "red.png")
    colour(0, 0, 255).save(folder / "below" / "blue.jpg")
    colour(0, 255, 0).save(folder / "GREEN.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_search_ranks_the_images_of_a_folder(model, images):
    result = invoke("search", model, images, "um gato", "--language", "pt", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {Path(hit["image"]).name for hit in found} == {"red.png", "blue.jpg", "GREEN.PNG"}
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_search_agrees_with_the_encoder(model, images, ort_encoder, engine):
    pytest.importorskip(engine)
    result = invoke("search", model, images, "gato", "--language", "pt", "-k", "1", "--engine", engine)
    assert result.exit_code == 0, result.output
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".png", ".jpg"))
    scores = ort_encoder.embed_images(paths) @ ort_encoder.embed_texts(["gato"], "pt")[0]
    assert result.stdout.split(maxsplit=1)[1].strip() == str(paths[int(scores.argmax())])


def test_search_reports_a_bad_image_or_skips_it(model, images):
    (images / "broken.png").write_bytes(b"broken")
    failed = invoke("search", model, images, "gato", "--language", "pt")
    assert failed.exit_code == 1
    assert "broken.png cannot be decoded" in failed.stderr
    skipped = invoke("search", model, images, "gato", "--language", "pt", "--skip-bad")
    assert skipped.exit_code == 0, skipped.output
    assert "broken.png cannot be decoded" in skipped.stderr
    assert len(skipped.stdout.splitlines()) == 3


@pytest.mark.parametrize("as_struct", [True, False])
def test_search_reads_images_from_parquet(tmp_path, model, as_struct):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = []
    for image in (colour(255, 0, 0), colour(0, 0, 255)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None} if as_struct else buffer.getvalue())
    path = tmp_path / "images.parquet"
    parquet.write_table(pyarrow.table({"image": cells, "id": ["red", "blue"]}), path)
    result = invoke("search", model, path, "gato", "--language", "pt", "--json")
    assert result.exit_code == 0, result.output
    assert {hit["image"] for hit in json.loads(result.stdout)} == {"red", "blue"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "{model}", "{images}", "gato"], 1, "needs the language"),
        (["search", "{model}", "{images}", "gato", "--language", "xx"], 1, "'xx' is unknown"),
        (["search", "{model}", "nowhere", "gato", "--language", "pt"], 1, "nowhere does not exist"),
        (
            ["search", "{model}", "{images}", "gato", "--language", "pt", "--dim", "5"],
            1,
            "no vectors of width 5",
        ),
        (["search", "{model}", "{images}", "gato", "--engine", "abacus"], 2, "abacus"),
        (["search", "{model}", "gato"], 1, "The query is missing"),
        (
            ["search", "{model}", "{images}/below/../notes.txt", "gato", "--language", "pt"],
            1,
            "its format is unknown",
        ),
        (["inspect", "no/such"], 1, "not a folder"),
        (["languages", "no/such"], 1, "not a folder"),
    ],
)
def test_a_command_that_fails_says_why(model, images, arguments, code, message):
    result = invoke(*(argument.format(model=model, images=images) for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_inspect_describes_a_model(model):
    result = invoke("inspect", model)
    assert result.exit_code == 0, result.output
    for fact in ("nllb-clip", "MIT", "24, 8", "fp32", "int8", "≥ 0.9999", "files verified"):
        assert fact in result.stdout
    summary = json.loads(invoke("inspect", model, "--json").stdout)
    assert summary["fingerprint"] == "f" * 16
    assert summary["languages"] == LANGUAGE_TOKENS


def test_inspect_finds_a_changed_file(own_model):
    (own_model.parent / "tiny_text_tower_fp32" / "tokenizer.json").write_text("{}")
    result = invoke("inspect", own_model)
    assert result.exit_code == 1
    assert "tokenizer.json" in result.stderr


def test_languages_lists_the_table_or_a_models_own(model):
    everything = invoke("languages").stdout.splitlines()
    own = invoke("languages", model).stdout.splitlines()
    assert len(everything) > 200
    assert [line.split()[:2] for line in own] == [
        ["eng_Latn", "en"],
        ["por_Latn", "pt"],
        ["zho_Hans", "zh-Hans"],
    ]


def test_languages_shows_what_a_code_stands_for(model):
    found = invoke("languages", "--code", "zh-TW", "--code", "sr_RS@latin").stdout.splitlines()
    assert [line.split()[:2] for line in found] == [["zho_Hant", "zh-Hant"], ["srp_Latn", "sr-Latn"]]
    own = invoke("languages", model, "--code", "pt-BR", "--json")
    assert [row["flores"] for row in json.loads(own.stdout)] == ["por_Latn"]
    unspoken = invoke("languages", model, "--code", "zh-TW")
    assert unspoken.exit_code == 1
    assert "does not support" in unspoken.stderr
    assert "(closest: zho_Hans)" in unspoken.stderr


def test_the_package_exports_what_it_says():
    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    assert sorted(runtime.__all__) == list(runtime.__all__)
    assert set(runtime.__all__) <= set(dir(runtime))


IMPORTS = """
import sys, time
import runtime
from runtime import Encoder
from runtime.commands.app import app
heavy = {"torch", "transformers", "onnx", "onnxruntime", "openvino", "pyarrow", "ftfy", "open_clip"}
print(sorted(heavy & set(sys.modules)), time.process_time() < 1)
"""


def test_importing_the_runtime_is_light():
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == "[] True"


def frames_of_one_image(n, kind):
    file = io.BytesIO()
    first, *others = [Image.new("RGB", (20, 20), (i * 30 + 5, 255 - i * 30, i * 7)) for i in range(n)]
    first.save(file, kind, save_all=True, append_images=others)
    return file


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_frames_of_one_image_are_embedded_each(ort_encoder, kind, batch_size):
    """The iterator gives one object, at another frame each time."""
    file = frames_of_one_image(7, kind)
    alone = [frame.copy() for frame in ImageSequence.Iterator(Image.open(file))]
    expected = np.concatenate([ort_encoder.embed_images([frame]) for frame in alone])
    found = ort_encoder.embed_images(ImageSequence.Iterator(Image.open(file)), batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(np.unique(found.round(4), axis=0)) == 7


def test_images_are_taken_no_earlier_than_their_batch(ort_encoder):
    arrays = [np.full((20, 20, 3), (9, level, 90), np.uint8) for level in (0, 120, 240, 30)]
    expected = ort_encoder.embed_images([arrays[0], arrays[1], arrays[0], arrays[1]])
    asked = []

    def given():
        for array in arrays:
            asked.append(len(asked))
            yield array

    parts = ort_encoder.iter_images(given(), batch_size=2)
    assert asked == []
    found = [next(parts)]
    assert asked == [0, 1]
    arrays[0][:] = arrays[1][:] = 255  # embedded already
    arrays[2][:], arrays[3][:] = (9, 0, 90), (9, 120, 90)
    found += parts
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_of_nothing_is_an_error(ort_encoder, batch_size):
    with pytest.raises(InputError, match=rf"batch_size is {batch_size}; expected at least 1"):
        ort_encoder.embed_images([colour(0, 0, 0)], batch_size=batch_size)
