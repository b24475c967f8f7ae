"""Embedding a set through stand-ins for the library and the encoder: padding, order, languages, failures."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.datasets import Captions, ImageBytes, RetrievalSet
from export.retrieval import vectors
from export.retrieval.vectors import TextIndex, exported_vectors, reference_vectors, spoken_part
from runtime.errors import ImageError, LanguageError, ParityError
from runtime.manifest import TextPreprocessing

PAD = 1
CONTEXT = 12
TEXT = TextPreprocessing(CONTEXT, PAD, (), (2,), "none")


def ids_of(text: str) -> list[int]:
    return [*(10 + ord(character) % 50 for character in text[:CONTEXT]), 2]


def vector_of(ids: list[int]) -> np.ndarray:
    return np.array([len(ids), sum(ids), ids[0]], dtype=np.float32)


class FakeReference:
    """Vectors say which ids came in; the widths that were asked for are kept."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.languages: list[str | None] = []

    def token_ids(self, texts, languages):
        self.languages += languages
        rows = [ids_of(text) + [PAD] * (CONTEXT + 1 - len(ids_of(text))) for text in texts]
        return np.array(rows, dtype=np.int64)

    def text_vectors(self, ids):
        self.widths.append(ids.shape[1])
        own = [[token for token in row if token != PAD] for row in ids.tolist()]
        full = np.stack([vector_of(row) for row in own])
        return {2: full[:, :2], 3: full}

    def pixels(self, image):
        return np.full((3, 2, 2), np.asarray(image.convert("RGB"))[0, 0, 0], dtype=np.float32)

    def image_vectors(self, pixels):
        return {2: pixels[:, :2, 0, 0], 3: pixels[:, :, 0, 0]}


class FakeEncoder:
    def __init__(self) -> None:
        self.languages: list[object] = []

    def embed_texts(self, texts, language=None, *, dim):
        self.languages.append(language)
        return np.stack([vector_of(ids_of(text)) for text in texts])[:, :dim]

    def iter_images(self, images, *, dim, batch_size):
        for data in images:
            red = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 0, 0]
            yield np.full((1, dim), red, dtype=np.float32)


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def small_set() -> RetrievalSet:
    images = tuple(ImageBytes(str(red), png(red)) for red in range(40))
    texts = tuple("x" * (1 + i * 7 % 11) + str(i) for i in range(40))
    return RetrievalSet(
        "small",
        images,
        (
            Captions("en", "eng_Latn", texts, tuple(range(40))),
            Captions("pt", "por_Latn", texts[::-1], tuple(range(40))),
        ),
    )


def silent(*_: object) -> None:
    """Report no progress."""


@pytest.mark.parametrize("with_language", [True, False])
def test_both_sides_embed_in_order(with_language, monkeypatch):
    monkeypatch.setattr(vectors, "_WINDOW", 17)
    monkeypatch.setattr(vectors, "_BATCH_TOKENS", 40)
    dataset = small_set()
    index = TextIndex.of(dataset, with_language=with_language)
    reference, encoder = FakeReference(), FakeEncoder()
    left = reference_vectors(reference, dataset, index, dim=3, text=TEXT, progress=silent)
    right = exported_vectors(encoder, dataset, index, dim=3, progress=silent)
    assert left.texts.tolist() == right.texts.tolist()
    assert left.images.tolist() == right.images.tolist() == [[red] * 3 for red in range(40)]
    for entry in dataset.captions:
        assert left.of(entry).tolist() == [vector_of(ids_of(text)).tolist() for text in entry.texts]
    spoken = {"eng_Latn", "por_Latn"} if with_language else {None}
    assert set(reference.languages) == spoken
    if with_language:
        assert {code for codes in encoder.languages for code in codes} == spoken
    else:
        assert set(encoder.languages) == {None}


def test_a_narrower_head_is_asked_for_on_both_sides():
    dataset = small_set()
    index = TextIndex.of(dataset, with_language=True)
    left = reference_vectors(FakeReference(), dataset, index, dim=2, text=TEXT, progress=silent)
    right = exported_vectors(FakeEncoder(), dataset, index, dim=2, progress=silent)
    assert left.texts.shape == right.texts.shape == (80, 2)
    assert left.images.shape == right.images.shape == (40, 2)


def test_pytorch_is_padded_to_a_batch_not_to_the_context(monkeypatch):
    monkeypatch.setattr(vectors, "_BATCH_TOKENS", 40)
    dataset = small_set()
    reference = FakeReference()
    index = TextIndex.of(dataset, with_language=True)
    reference_vectors(reference, dataset, index, dim=3, text=TEXT, progress=silent)
    assert min(reference.widths) < CONTEXT
    assert max(reference.widths) == max(len(ids_of(text)) for text in index.texts)


def test_progress_counts_to_the_end():
    dataset = small_set()
    seen = {}
    index = TextIndex.of(dataset, with_language=True)
    exported_vectors(
        FakeEncoder(),
        dataset,
        index,
        dim=3,
        progress=lambda stage, done, total: seen.update({stage: (done, total)}),
    )
    assert seen == {"exported texts": (80, 80), "exported images": (40, 40)}


def test_vectors_that_are_not_finite_are_refused():
    class Overflowing(FakeEncoder):
        def embed_texts(self, texts, language=None, *, dim):
            found = super().embed_texts(texts, language, dim=dim)
            found[3] = np.inf
            return found

    dataset = small_set()
    index = TextIndex.of(dataset, with_language=True)
    with pytest.raises(ParityError, match=r"exported texts: 1 of 80 vectors are not finite.*'xxxxxxxxxxx3'"):
        exported_vectors(Overflowing(), dataset, index, dim=3, progress=silent)


def test_an_undecodable_image_is_named():
    dataset = RetrievalSet("s", (ImageBytes("bad", b"no"),), (Captions("en", "eng_Latn", ("x",), (0,)),))
    index = TextIndex.of(dataset, with_language=True)
    with pytest.raises(ImageError, match=r"Image bad cannot be decoded.*Download the data set again"):
        reference_vectors(FakeReference(), dataset, index, dim=3, text=TEXT, progress=silent)


def towers(*known: str) -> SimpleNamespace:
    ids = dict.fromkeys(known, 7)
    return SimpleNamespace(
        text_preprocessing=SimpleNamespace(needs_language=bool(ids), kept_languages=(), language_ids=ids)
    )


@pytest.mark.parametrize(
    ("known", "spoken", "unspoken"),
    [
        ((), ("en", "pt"), ()),
        (("eng_Latn", "por_Latn"), ("en", "pt"), ()),
        (("por_Latn",), ("pt",), ("en",)),
    ],
)
def test_languages_without_a_token_are_left_out_and_named(known, spoken, unspoken):
    part, left_out = spoken_part(small_set(), towers(*known))
    assert part.codes == spoken
    assert left_out == unspoken


def test_a_tower_that_speaks_none_of_them_is_refused():
    with pytest.raises(LanguageError, match=r"tokens for none of \['en', 'pt'\]; it has \['zul_Latn'\]"):
        spoken_part(small_set(), towers("zul_Latn"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "--language-map"),
        (["no-such-sample"], 1, "error: No sample checkpoint 'no-such-sample'"),
        (["--dataset", "xtd10"], 1, "error: The layout 'xtd10' needs its folder; pass --data FOLDER."),
        (["--languages", "tlh"], 1, "no captions in ['tlh']"),
        (["--checkpoint", "somewhere"], 2, "--checkpoint and --model together"),
    ],
)
def test_the_command_refuses_in_one_message(arguments, code, message):
    pytest.importorskip("torch")
    from bench.retrieval import app

    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output
