"""Every family, both towers: the exported graphs against the family's own library."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sample_models import CHECKPOINTS, NAMES, Exported

from export import towers_from_checkpoint
from export.towers import Towers
from runtime import Encoder
from runtime.backends import open_backend
from runtime.backends.backend import Backend
from runtime.cosines import row_cosines
from runtime.manifest import GRAPH_ENGINES, Engine, Manifest, Modality, Precision

BATCHES = (1, 2, 7, 32)
SEQUENCES = (2, 3, 16, 77)


@cache
def towers(name: str) -> Towers:
    return towers_from_checkpoint(CHECKPOINTS / name)


def backend(model: Path, modality: Modality, engine: Engine) -> Backend:
    tower = Manifest.read(model).variant(Precision.FP32).tower(modality)
    return open_backend(engine, model.parent / tower.model / "1" / tower.graph, precision=Precision.FP32)


def assert_agree(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5
    assert row_cosines(found, expected).min() >= 0.999999


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_text_graph_agrees_with_torch_at_every_shape(name: str, engine: Engine, exported: Exported) -> None:
    model, random = towers(name), np.random.default_rng(0)
    graph = backend(exported(name), Modality.TEXT, engine)
    outputs = [f"vector_{dim}" if dim != model.dim else "vector" for dim in model.dims]
    pad = model.text_preprocessing.pad_id
    for batch in BATCHES:
        for sequence in SEQUENCES:
            ids = random.integers(2, model.n_tokens, (batch, sequence))
            for row in range(1, batch):
                ids[row, max(2, sequence - row) :] = pad
            found = graph.run({"input_ids": ids, "attention_mask": (ids != pad).astype(np.int64)}, outputs)
            expected = model.reference.text_vectors(ids)
            for vectors, dim in zip(found, model.dims, strict=True):
                assert_agree(vectors, expected[dim])
    graph.close()


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_image_graph_agrees_with_torch_at_every_batch(name: str, engine: Engine, exported: Exported) -> None:
    model, random = towers(name), np.random.default_rng(0)
    graph = backend(exported(name), Modality.IMAGE, engine)
    outputs = [f"vector_{dim}" if dim != model.dim else "vector" for dim in model.dims]
    image = model.image_preprocessing
    mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (image.mean, image.std))
    for batch in BATCHES:
        pixels = random.integers(0, 256, (batch, 3, image.height, image.width), dtype=np.uint8)
        found = graph.run({"pixels": pixels}, outputs)
        expected = model.reference.image_vectors((pixels.astype(np.float32) / 255 - mean) / std)
        for vectors, dim in zip(found, model.dims, strict=True):
            assert_agree(vectors, expected[dim])
    graph.close()


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_equals_the_row_in_a_batch(name: str, engine: Engine, exported: Exported) -> None:
    from PIL import Image

    texts = ["", "cat", "gato preto na rua", "猫", "قط", "แมว " * 30, "a b c d e f g"]
    images = [Image.new("RGB", (40 + 9 * i, 64), (20 * i, 255 - 20 * i, 90)) for i in range(7)]
    with Encoder.open(exported(name), engine=engine, threads=1) as encoder:
        together = encoder.embed_texts(texts, "por_Latn"), encoder.embed_images(images)
        for i in range(7):
            assert np.abs(encoder.embed_texts([texts[i]], "por_Latn")[0] - together[0][i]).max() <= 1e-6
            assert np.abs(encoder.embed_images([images[i]])[0] - together[1][i]).max() <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("nllb")])
def test_the_language_token_is_used_and_belongs_to_each_text(name: str, exported: Exported) -> None:
    with Encoder.open(exported(name), threads=1) as encoder:
        alone = encoder.embed_texts(["gato"], "por_Latn")[0]
        mixed = encoder.embed_texts(
            ["cat", "gato", "猫", "gato"], ["eng_Latn", "por_Latn", "zho_Hans", "fra_Latn"]
        )
    assert np.abs(mixed[1] - alone).max() <= 1e-6
    assert float(mixed[3] @ alone) < 0.999


def test_samples_share_two_tokenizers_with_those_compared_below() -> None:
    assert towers("nllb-siglip-mrl").tokenizer_json == towers("nllb-clip").tokenizer_json
    assert towers("capivara-lora").tokenizer_json == towers("capivara").tokenizer_json


@pytest.mark.parametrize("name", ["nllb-clip", "capivara", "altclip"])
def test_token_ids_equal_the_reference_on_all_captions(name: str, exported: Exported) -> None:
    from runtime.preprocessing.text import Tokenizer, texts_with_languages
    from samples import dataset

    captions = dataset.load_captions()
    extra = [
        "",
        " ",
        "\u0301",
        "e\u0301é",
        "a\u200bb",
        "</s> x",
        "eng_Latn",
        "<pad>",
        "&amp; &lt;",
        "“x”",
        "ﬁ",
        "👩‍🚀" * 40,
    ]
    texts = [c.text for c in captions] + extra
    languages = [c.flores for c in captions] + ["eng_Latn"] * len(extra)
    expected = towers(name).reference.token_ids(texts, languages)
    manifest = Manifest.read(exported(name))
    tokenizer = Tokenizer(exported(name).parent / manifest.variant(Precision.FP32).tokenizer, manifest.text)
    rows = tokenizer.rows_from_texts(list(texts_with_languages(texts, languages)))
    context, pad = expected.shape[1], manifest.text.pad_id
    found = np.array([row.ids + [pad] * (context - len(row.ids)) for row in rows])
    different = np.flatnonzero((found != expected).any(axis=1))
    assert not len(different), [(texts[i], found[i][:12], expected[i][:12]) for i in different[:3]]
