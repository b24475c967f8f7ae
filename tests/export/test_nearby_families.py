"""Families whose checkpoints are read but not trained here, at tiny size with random weights.

Each is compared with its own library, called as its users call it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nearby_checkpoints import N_TOKENS, NEARBY, tiny_nearby
from nearby_libraries import Library, library_of
from PIL import Image
from small_exports import FEW, few_drawings
from tiny_checkpoints import WIDTH, read_json, write_json

from bench.full_size import fused_error
from export import repository_from_checkpoint, towers_from_checkpoint
from export.families import FAMILIES
from export.families.open_clip_checkpoint import checkpoint_from_folder
from export.parity.probes import probe_images
from export.precision.calibration import CalibrationSize
from export.variants import forms_for
from runtime import Encoder
from runtime.corpus import embedded_batches
from runtime.cosines import row_cosines
from runtime.errors import CheckpointError
from runtime.manifest import GRAPH_ENGINES, Engine, Manifest, Modality, Precision
from runtime.preprocessing.image import pixels_from_image
from runtime.preprocessing.text import Tokenizer, texts_with_languages
from runtime.server import ServerEnvironment, running_server
from runtime.triton_config import config_from_text
from samples import dataset

Arguments = Callable[[str], dict[str, Any]]
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
LEAST_COSINE = {Precision.FP32: 0.999999, Precision.FP16: 0.9999, Precision.INT8: 0.9}
"""Of random weights, which have outliers that trained ones do not."""

AWKWARD = (
    "",
    " ",
    "a",
    "two  spaces\tand a\nline",
    "UPPER lower ÀÉÎ Straße İstanbul ΣΊΣΥΦΟΣ",
    "it's #1: (well) under_score, e.g. 3.14!",
    "&amp; &lt;b&gt; ﬁne ｆｕｌｌ　ｗｉｄｔｈ",
    "e\u0301 \u00e9 👩\u200d🚀 𠮷 \U0010ffff",
    "猫が眠っている 고양이 แมวนอน قطة नमस्ते",
    " ".join(map(str, range(60))),
)
MARKS = ("<s> a </s> b", "a <pad> b", "<unk> <mask>", "<eos> <bos> a")
"""Special tokens written out in a text."""


@cache
def texts() -> list[str]:
    """A name in every language of the samples, and awkward texts."""
    first = {caption.flores: caption.text for caption in dataset.load_captions()}
    return [*first.values(), *AWKWARD, *MARKS]


@cache
def images() -> list[Image.Image]:
    """The probes without transparency, which SigLIP's library does not take."""
    return [Image.fromarray(np.asarray(image.convert("RGB"))) for image in probe_images()]


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """Arguments of ``towers_from_checkpoint``, by family."""
    root = tmp_path_factory.mktemp("nearby")
    return cache(lambda family: tiny_nearby(family, root / family))


@pytest.fixture(scope="session")
def library(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Library]:
    return cache(lambda family: library_of(family, arguments(family), tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="session")
def models(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """REPOSITORY/NAME of a family in three precisions; any drop of recall passes: it is noise."""
    repository = tmp_path_factory.mktemp("repository")
    forms = [
        *forms_for([Precision.FP32], [], installed=GRAPH_ENGINES),
        *forms_for(PRECISIONS[1:], [Engine.ONNXRUNTIME], installed=GRAPH_ENGINES),
    ]
    dataset = few_drawings()
    options = dataclasses.replace(
        FEW,
        forms=tuple(forms),
        accept_drop=0.99,
        captions_per_language=6,
        retrieval_set=dataset.select(dataset.codes[::20]),
        calibration_size=CalibrationSize(128, 32, 0),
    )

    @cache
    def model(family: str) -> Path:
        own = dict(arguments(family))
        done = repository_from_checkpoint(
            own.pop("checkpoint"), repository, name=family, options=options, **own
        )
        assert not done.dropped
        return done.model

    return model


def test_every_family_is_trained_or_here() -> None:
    trained = {"nllb-clip", "capivara", "altclip"}
    here = {name.removesuffix("-open-clip") for name in NEARBY}
    assert {family.name for family in FAMILIES} == trained | here


@pytest.mark.parametrize("family", NEARBY)
def test_token_ids_equal_the_librarys(
    family: str, models: Callable[[str], Path], library: Callable[[str], Library]
) -> None:
    model = models(family)
    manifest = Manifest.read(model)
    tokenizer = Tokenizer(model.parent / manifest.variants["fp32"].tokenizer, manifest.text)
    rows = tokenizer.rows_from_texts(list(texts_with_languages(texts(), None)))
    for text, row in zip(texts(), rows, strict=True):
        expected = library(family).token_ids(text)
        padded = row.ids + [manifest.text.pad_id] * (len(expected) - len(row.ids))
        assert padded == expected, text


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", NEARBY)
def test_texts_agree_with_the_library(
    family: str, precision: Precision, models: Callable[[str], Path], library: Callable[[str], Library]
) -> None:
    with Encoder.open(models(family), precision=precision, engine=Engine.ONNXRUNTIME, threads=1) as encoder:
        found = encoder.embed_texts(texts())
    expected = library(family).text_vectors(texts())
    cosines = row_cosines(found, expected)
    assert cosines.min() >= LEAST_COSINE[precision], texts()[int(cosines.argmin())]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", NEARBY)
def test_images_agree_with_the_library(
    family: str, precision: Precision, models: Callable[[str], Path], library: Callable[[str], Library]
) -> None:
    with Encoder.open(models(family), precision=precision, engine=Engine.ONNXRUNTIME, threads=1) as encoder:
        found = encoder.embed_images(images())
    assert row_cosines(found, library(family).image_vectors(images())).min() >= LEAST_COSINE[precision]


@pytest.mark.parametrize("family", NEARBY)
def test_a_text_alone_equals_the_text_in_a_batch(family: str, models: Callable[[str], Path]) -> None:
    with Encoder.open(models(family), engine=Engine.OPENVINO, threads=1) as encoder:
        together = encoder.embed_texts(texts())
        for row in range(0, len(texts()), 9):
            assert np.abs(encoder.embed_texts([texts()[row]])[0] - together[row]).max() <= 1e-6


@pytest.mark.parametrize("family", ["siglip2", "metaclip2"])
def test_a_corpus_gives_the_encoders_vectors(family: str, models: Callable[[str], Path]) -> None:
    with Encoder.open(models(family), engine=Engine.ONNXRUNTIME, threads=1) as encoder:
        shown = [text for text in texts() if text.strip()]  # a corpus's blank texts are bad rows
        expected = encoder.embed_texts(shown)
        (batch,) = embedded_batches(encoder, shown, max_batch_tokens=300)
    assert np.abs(np.asarray(batch.vectors) - expected).max() <= 1e-6


def test_the_token_table_is_int8(models: Callable[[str], Path]) -> None:
    model = models("metaclip2")
    tower = Manifest.read(model).variant(Precision.INT8).text
    graph = onnx.load(model.parent / tower.model / "1" / tower.graph, load_external_data=False).graph
    tables = [entry for entry in graph.initializer if list(entry.dims) == [N_TOKENS, WIDTH]]
    assert [entry.data_type for entry in tables] == [onnx.TensorProto.INT8]


@pytest.mark.parametrize("modality", Modality)
def test_siglip2_fits_a_gpu(modality: Modality, models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("siglip2")
    tower = Manifest.read(model).variants["fp32"].tower(modality)
    assert fused_error(model.parent / tower.model / "1" / tower.graph, tmp_path / "fused") <= 2e-6


def test_texts_of_a_fixed_length_have_one_length_and_no_mask(models: Callable[[str], Path]) -> None:
    model = models("siglip2")
    manifest = Manifest.read(model)
    tower = manifest.variants["fp32"].text
    assert manifest.text.fixed_length
    assert tower.inputs == ("input_ids",)
    config = config_from_text((model.parent / tower.model / "config.pbtxt").read_text(), origin="it")
    assert [(entry.name, list(entry.dims)) for entry in config.input] == [("input_ids", [64])]
    with Encoder.open(model, engine=Engine.ONNXRUNTIME, threads=1) as encoder:
        encoder.embed_texts(["a", "a b c", "a b c " * 40])
        assert (encoder.stats.tokens, encoder.stats.padding_tokens) == (3 * 64, 0)
        assert encoder.stats.truncated_texts == 1


def test_a_causal_tower_is_given_no_mask_and_pads_to_the_longest(models: Callable[[str], Path]) -> None:
    model = models("metaclip2")
    manifest = Manifest.read(model)
    assert manifest.variants["fp32"].text.inputs == ("input_ids",)
    with Encoder.open(model, engine=Engine.ONNXRUNTIME, threads=1) as encoder:
        encoder.embed_texts(["a", "a b c"])
        assert encoder.stats.tokens + encoder.stats.padding_tokens < 2 * manifest.text.context_length


def test_a_server_gives_the_encoders_vectors(
    models: Callable[[str], Path], server_environment: ServerEnvironment
) -> None:
    found = {family: models(family) for family in NEARBY}
    (repository,) = {model.parent for model in found.values()}
    with running_server(repository, environment=server_environment) as server:
        for family, model in found.items():
            address = f"grpc://{server.addresses.grpc}/{family}"
            with Encoder.open(address) as remote, Encoder.open(model, engine=Engine.ONNXRUNTIME) as local:
                shown = [text for text in texts() if text.strip()]
                assert np.abs(remote.embed_texts(shown) - local.embed_texts(shown)).max() <= 1e-6, family
                assert np.abs(remote.embed_images(images()) - local.embed_images(images())).max() <= 1e-6


FEATURES: dict[str, tuple[list[str], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "m-clip": (["query", "value"], lambda model, ids: model.text_features(ids, torch.ones_like(ids))),
    "siglip2": (["q_proj", "v_proj"], lambda model, ids: model.get_text_features(ids).pooler_output),
    "siglip2-open-clip": (["c_fc", "c_proj"], lambda model, ids: model.text(ids)),
    "metaclip2": (["q_proj", "fc1"], lambda model, ids: model.get_text_features(ids).pooler_output),
}
"""Modules that an adapter is made on, and the text features of the library's model."""


@pytest.mark.parametrize("family", FEATURES)
def test_an_adapter_is_merged(family: str, arguments: Arguments, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets, features = FEATURES[family]
    own = dict(arguments(family))
    reference: Any = towers_from_checkpoint(**own).reference
    base = own.pop("checkpoint")
    if family == "siglip2-open-clip":
        model = checkpoint_from_folder(base, own_text=True).model
    else:
        model = reference.model
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    towers = towers_from_checkpoint(tmp_path / "adapter", base=base, **own)
    ids = torch.randint(5, 900, (3, towers.text_preprocessing.context_length))
    ids[:, -1] = towers.text_preprocessing.suffix_ids[-1]
    with torch.inference_mode():
        expected = features(adapted.base_model.model, ids).numpy()
        found = towers.text(ids)[0].numpy()
    assert row_cosines(found, expected).min() >= 0.999999


# SigLIP 2


def test_siglip2_keeps_its_length(arguments: Arguments) -> None:
    for family in ("siglip2", "siglip2-open-clip"):
        with pytest.raises(CheckpointError, match="reads the padding of every text up to its 64 tokens"):
            towers_from_checkpoint(arguments(family)["checkpoint"], context_length=77)


def test_siglip2_is_read_in_lower_case_whatever_class_its_files_name(arguments: Arguments) -> None:
    towers = towers_from_checkpoint(arguments("siglip2")["checkpoint"])
    ids = towers.reference.token_ids(["HELLO World", "hello world"], [None, None])
    assert ids[0].tolist() == ids[1].tolist()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "siglip2"}, "variable resolution"),
        ("tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"}, "first SigLIP"),
        ("tokenizer_config.json", {"padding_side": "left"}, "pads on the left"),
        ("preprocessor_config.json", {"do_normalize": False}, "off \\['do_normalize'\\]"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "no other is supported"),
    ],
)
def test_another_siglip_is_refused(
    file: str, change: dict[str, Any], message: str, arguments: Arguments, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(arguments("siglip2")["checkpoint"], tmp_path / "changed"))
    write_json(folder / file, {**read_json(folder / file), **change})
    with pytest.raises(CheckpointError, match=message):
        towers_from_checkpoint(folder)


# MetaCLIP 2


def test_metaclip2_refuses_a_tokenizer_that_ends_otherwise(arguments: Arguments, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(arguments("metaclip2")["checkpoint"], tmp_path / "changed"))
    config = read_json(folder / "config.json")
    config["text_config"]["eos_token_id"] = 7
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"ends texts with \[2\], but the model pools token 7"):
        towers_from_checkpoint(folder)


def test_metaclip2_of_378_pixels_resizes_both_sides(arguments: Arguments, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(arguments("metaclip2")["checkpoint"], tmp_path / "changed"))
    processor = read_json(folder / "preprocessor_config.json")
    processor |= {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    write_json(folder / "preprocessor_config.json", processor)
    towers = towers_from_checkpoint(folder)
    assert towers.image_preprocessing.resize == "squash"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    mean, std = (
        np.reshape(x, (3, 1, 1)) for x in (towers.image_preprocessing.mean, towers.image_preprocessing.std)
    )
    own = (pixels_from_image(picture, towers.image_preprocessing) / 255 - mean) / std
    assert np.abs(own - towers.reference.pixels(picture)).max() <= 1e-5


# M-CLIP


def test_m_clip_names_its_image_towers(arguments: Arguments) -> None:
    with pytest.raises(CheckpointError, match=r"--image-tower .*vit_base_patch32_clip_224\.openai"):
        towers_from_checkpoint(arguments("m-clip")["checkpoint"])


def test_m_clip_refuses_an_image_tower_of_another_width(arguments: Arguments, tmp_path: Path) -> None:
    own = arguments("m-clip")
    changed = {**read_json(own["checkpoint"] / "config.json"), "numDims": 7}
    write_json(tmp_path / "config.json", changed)
    (tmp_path / "pytorch_model.bin").symlink_to(own["checkpoint"] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"vectors of 8 components.*one of 7"):
        towers_from_checkpoint(tmp_path, image_tower=own["image_tower"])


def test_m_clip_refuses_a_text_model_of_another_kind(arguments: Arguments, tmp_path: Path) -> None:
    own = arguments("m-clip")
    (tmp_path / "bert").mkdir()
    write_json(tmp_path / "bert" / "config.json", {"model_type": "bert"})
    changed = {**read_json(own["checkpoint"] / "config.json"), "modelBase": str(tmp_path / "bert")}
    write_json(tmp_path / "config.json", changed)
    (tmp_path / "pytorch_model.bin").symlink_to(own["checkpoint"] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="of type 'bert'; only XLM-R"):
        towers_from_checkpoint(tmp_path, image_tower=own["image_tower"])


def test_an_image_tower_is_refused_where_the_checkpoint_has_one(arguments: Arguments) -> None:
    folder = arguments("xlm-roberta-clip")["checkpoint"]
    with pytest.raises(CheckpointError, match="Leave --image-tower out"):
        towers_from_checkpoint(folder, image_tower=folder)
