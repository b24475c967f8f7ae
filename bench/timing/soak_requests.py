"""Requests of a soak test: valid ones with their expected vectors, and every kind of invalid one."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.server_load import realistic_texts
from runtime.encoder import Encoder
from runtime.manifest import Manifest
from runtime.preprocessing.image import decode

__all__ = ["BAD_EVERY", "Request", "bad_requests", "requests_of_soak"]

BAD_EVERY = 20
"""One request in so many is invalid: 5%."""

_IMAGE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """Request, and its expected answer.

    Attributes:
        inputs: Tensors by name: objects (BYTES) or int32.
        kind: Label for counting.
        expected: float32 (dim,), or ``None`` if INVALID_ARGUMENT is expected.
    """

    model: str
    inputs: dict[str, NDArray[Any]]
    kind: str
    expected: NDArray[np.float32] | None = None


def requests_of_soak(model: Path, n_requests: int) -> list[Request]:
    """Return the requests in the order of sending, drawn with a fixed seed.

    Expected vectors are those of the in-process runtime with the variant that the front ends serve.
    """
    from samples import dataset

    manifest = Manifest.read(model)
    name, known = manifest.name, manifest.text.language_ids
    texts, given = realistic_texts(500)
    languages = [code if not known or code in known else "eng_Latn" for code in given]
    images = list(_in_all_formats([drawing.png for drawing in dataset.load_gallery()[:100]]))
    (front_ends,) = manifest.front_ends
    variant = manifest.variants[front_ends.variant]
    with Encoder.open(model, engine=variant.engines[0], precision=variant.precision, threads=2) as encoder:
        text_vectors = encoder.embed_texts(texts, languages)
        image_vectors = encoder.embed_images(images)
    good_texts = [
        Request(
            f"{name}_text",
            {"text": _rows(text.encode()), "language": _rows(language.encode())},
            "text",
            vector,
        )
        for text, language, vector in zip(texts, languages, text_vectors, strict=True)
    ]
    good_images = [
        Request(f"{name}_image", {"image": _rows(image)}, "image", vector)
        for image, vector in zip(images, image_vectors, strict=True)
    ]
    bad = bad_requests(name, asks_language=bool(known), image=images[0])
    draw = random.Random(0)
    return [
        bad[i // BAD_EVERY % len(bad)]
        if i % BAD_EVERY == BAD_EVERY - 1
        else draw.choice(good_images if draw.random() < _IMAGE_SHARE else good_texts)
        for i in range(n_requests)
    ]


def bad_requests(name: str, *, asks_language: bool, image: bytes) -> list[Request]:
    """Return one invalid request of each kind.

    Args:
        asks_language: The towers have language tokens, so that a text must have a language.
        image: A valid image, to be corrupted.
    """
    named = {"language": _rows(b"por_Latn")} if asks_language else {}

    def text(kind: str, value: bytes, **others: NDArray[Any]) -> Request:
        return Request(f"{name}_text", {"text": _rows(value), **named, **others}, kind)

    def picture(kind: str, value: bytes, **others: NDArray[Any]) -> Request:
        return Request(f"{name}_image", {"image": _rows(value), **others}, kind)

    number = np.array([[1]], np.int32)
    cat = text("", b"gato")
    return [
        picture("corrupt image: no image at all", b"\x89PNG\r\n\x1a\nbroken"),
        picture("corrupt image: cut in the middle", image[: len(image) // 2]),
        picture("empty image", b""),
        picture("huge image: 200 million pixels", _bomb()),
        picture("huge image: 34 MB", bytes(34_000_000)),
        picture("image of unknown width", image, dim=np.array([[7]], np.int32)),
        dataclasses.replace(picture("", image), kind="image of wrong type", inputs={"image": number}),
        text("huge text: 100,000 bytes", b"x" * 100_000),
        text("empty text", b"  "),
        text("text that is no UTF-8", b"\xff\xfe"),
        text("unknown language", b"gato", language=_rows(b"xx-Nope")),
        text("language that is no UTF-8", b"gato", language=_rows(b"\xff")),
        dataclasses.replace(cat, kind="text of wrong type", inputs={**cat.inputs, "text": number}),
        dataclasses.replace(cat, kind="text of wrong shape", inputs={**named, "text": _rows(b"a")[0]}),
        dataclasses.replace(cat, kind="unknown input", inputs={**cat.inputs, "texts": _rows(b"a")}),
    ]


def _rows(*values: bytes) -> NDArray[Any]:
    return np.array([[value] for value in values], dtype=np.object_)


def _bomb() -> bytes:
    packed = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(packed, "PNG")
    return packed.getvalue()


def _in_all_formats(images: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the pictures as PNG, JPEG and WebP in rotation."""
    for i, image in enumerate(images):
        kind = ("PNG", "JPEG", "WEBP")[i % 3]
        if kind == "PNG":
            yield image
            continue
        packed = io.BytesIO()
        decode(image).convert("RGB").save(packed, kind)
        yield packed.getvalue()
