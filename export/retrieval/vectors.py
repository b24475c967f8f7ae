"""Embed a retrieval set twice: with the family's own library in PyTorch, and with the exported model.

Each distinct (text, language) is embedded once; for a tower without language tokens, each distinct text.
PyTorch gets the token ids of its own library, padded to the longest text of a batch of similar lengths: the
library itself pads to the context length, which takes up to ten times as long and changes a vector by 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from export.retrieval.metrics import Float, Int
from export.retrieval.sets import Captions, ImageSource, RetrievalSet
from runtime.errors import ImageError, LanguageError, ParityError
from runtime.manifest import TextPreprocessing
from runtime.preprocessing.batching import batches_from_rows, lengths_of_rows, windows
from runtime.preprocessing.image import decode

if TYPE_CHECKING:  # these import torch, which rendering finished results does not need
    from export.towers import Reference, Towers

__all__ = [
    "Embedder",
    "Progress",
    "TextIndex",
    "Vectors",
    "exported_image_vectors",
    "exported_text_vectors",
    "exported_vectors",
    "reference_image_vectors",
    "reference_text_vectors",
    "reference_vectors",
    "silent",
    "spoken_part",
]

Progress = Callable[[str, int, int], None]
"""Progress callback, called with the stage, the number of items done, and the total."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Ignore progress reports."""


REFERENCE_PADDING = "to the longest text of a batch"
"""Padding of the reference, for benchmark records; see the module's docstring."""

_WINDOW = 2_048
_BATCH_TOKENS = 1_024
_BATCH_IMAGES = 32


class Embedder(Protocol):
    """The part of an ``Encoder`` that embeds a retrieval set."""

    def embed_texts(
        self, texts: Iterable[str], language: Sequence[str] | None = None, *, dim: int | None = None
    ) -> Float:
        """Embed texts: unit float32 (texts, dim)."""

    def iter_images(self, images: Iterable[Any], *, dim: int | None, batch_size: int) -> Iterator[Float]:
        """Embed images lazily; yield unit float32 (batch, dim)."""


@dataclass(frozen=True, slots=True, eq=False)
class TextIndex:
    """Distinct texts of a set, and the rows of each language's captions among them.

    Attributes:
        texts: Distinct texts.
        languages: FLORES-200 code of each text, or None for a tower without language tokens.
        rows: Rows of ``texts`` for each caption, int64 (captions,), by language code of the set.
    """

    texts: tuple[str, ...]
    languages: tuple[str | None, ...]
    rows: dict[str, Int]

    @classmethod
    def of(cls, dataset: RetrievalSet, *, with_language: bool) -> TextIndex:
        """Build the index of a set's captions."""
        row_of: dict[tuple[str, str | None], int] = {}
        rows = {}
        for entry in dataset.captions:
            language = entry.language if with_language else None
            found = [row_of.setdefault((text, language), len(row_of)) for text in entry.texts]
            rows[entry.code] = np.array(found, dtype=np.int64)
        texts, languages = zip(*row_of, strict=True)
        return cls(texts, languages, rows)

    @classmethod
    def of_texts(cls, code: str, texts: Sequence[str], language: str | None) -> TextIndex:
        """Build the index of texts in one language, under the given code."""
        row_of: dict[str, int] = {}
        rows = np.array([row_of.setdefault(text, len(row_of)) for text in texts], dtype=np.int64)
        return cls(tuple(row_of), (language,) * len(row_of), {code: rows})


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Embeddings of a set: float32 unit vectors of images (images, dim) and distinct texts (texts, dim)."""

    images: Float
    texts: Float
    index: TextIndex

    def of(self, captions: Captions) -> Float:
        """Return the vectors of one language's captions, float32 (captions, dim)."""
        return self.texts[self.index.rows[captions.code]]


def spoken_part(dataset: RetrievalSet, towers: Towers) -> tuple[RetrievalSet, tuple[str, ...]]:
    """Split a set into the part in languages with language tokens, and the codes of the other languages.

    For a tower without language tokens, all languages are kept; if its vocabulary was pruned, the kept ones.

    Raises:
        LanguageError: the tower has tokens for none of the languages.
    """
    text = towers.text_preprocessing
    if not text.needs_language and not text.kept_languages:
        return dataset, ()
    known = text.language_ids or text.kept_languages
    spoken = [entry.code for entry in dataset.captions if entry.language in known]
    if not spoken:
        raise LanguageError(
            f"The text tower has tokens for none of {list(dataset.codes)}; it has {sorted(known)}. "
            "Choose another language map or data set."
        )
    return dataset.select(spoken), tuple(code for code in dataset.codes if code not in spoken)


def reference_vectors(
    reference: Reference,
    dataset: RetrievalSet,
    index: TextIndex,
    *,
    dim: int,
    text: TextPreprocessing,
    progress: Progress,
    max_batch_tokens: int = _BATCH_TOKENS,
    batch_images: int = _BATCH_IMAGES,
) -> Vectors:
    """Embed a set with the family's own library, at width ``dim``.

    Raises:
        ImageError: an image cannot be decoded.
        ParityError: a vector is not finite.
    """
    images = _reference_images(reference, dataset.images, dim, batch_images)
    return Vectors(
        _joined(images, dataset.images, "PyTorch images", progress),
        reference_text_vectors(
            reference, index, dim=dim, text=text, progress=progress, max_batch_tokens=max_batch_tokens
        ),
        index,
    )


def reference_text_vectors(
    reference: Reference,
    index: TextIndex,
    *,
    dim: int,
    text: TextPreprocessing,
    progress: Progress,
    max_batch_tokens: int = _BATCH_TOKENS,
) -> Float:
    """Embed only the texts with the family's own library, float32 (distinct texts, dim)."""
    texts = _reference_texts(reference, index, dim, text, max_batch_tokens)
    return _joined(texts, index.texts, "PyTorch texts", progress)


def reference_image_vectors(
    reference: Reference, images: Sequence[ImageSource], *, dim: int, progress: Progress
) -> Float:
    """Embed only the images with the family's own library, float32 (images, dim)."""
    return _joined(
        _reference_images(reference, images, dim, _BATCH_IMAGES), images, "PyTorch images", progress
    )


def exported_vectors(
    encoder: Embedder, dataset: RetrievalSet, index: TextIndex, *, dim: int, progress: Progress
) -> Vectors:
    """Embed a set with the exported model, from strings and encoded images.

    Raises:
        BabeltowerError: any error of the encoder.
        ParityError: a vector is not finite.
    """
    texts = exported_text_vectors(encoder, index, dim=dim, progress=progress)
    return Vectors(exported_image_vectors(encoder, dataset.images, dim=dim, progress=progress), texts, index)


def exported_text_vectors(encoder: Embedder, index: TextIndex, *, dim: int, progress: Progress) -> Float:
    """Embed only the texts with the exported model, float32 (distinct texts, dim)."""
    return _joined(_exported_texts(encoder, index, dim), index.texts, "exported texts", progress)


def exported_image_vectors(
    encoder: Embedder, images: Sequence[ImageSource], *, dim: int, progress: Progress
) -> Float:
    """Embed only the images with the exported model, float32 (images, dim)."""
    sources = (image.read() for image in images)
    vectors = encoder.iter_images(sources, dim=dim, batch_size=_BATCH_IMAGES)
    return _joined(vectors, images, "exported images", progress)


def _reference_texts(
    reference: Reference, index: TextIndex, dim: int, text: TextPreprocessing, max_batch_tokens: int
) -> Iterator[Float]:
    for window in windows(zip(index.texts, index.languages, strict=True), _WINDOW):
        texts, languages = zip(*window, strict=True)
        ids = reference.token_ids(texts, languages)
        lengths = lengths_of_rows(ids, text)
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        vectors: list[tuple[Int, Float]] = []
        for batch in batches_from_rows(rows, pad_id=text.pad_id, max_batch_tokens=max_batch_tokens):
            vectors.append((batch.positions, reference.text_vectors(batch.input_ids)[dim]))
        order = np.argsort(np.concatenate([positions for positions, _ in vectors]))
        yield np.concatenate([part for _, part in vectors])[order]


def _reference_images(
    reference: Reference, images: Sequence[ImageSource], dim: int, batch_size: int
) -> Iterator[Float]:
    for batch in windows(images, batch_size):
        pixels = np.stack([reference.pixels(_decoded(image)) for image in batch])
        yield reference.image_vectors(pixels)[dim]


def _exported_texts(encoder: Embedder, index: TextIndex, dim: int) -> Iterator[Float]:
    for window in windows(zip(index.texts, index.languages, strict=True), _WINDOW):
        texts, languages = zip(*window, strict=True)
        spoken = [language for language in languages if language is not None]
        yield encoder.embed_texts(texts, spoken if len(spoken) == len(texts) else None, dim=dim)


def _joined(parts: Iterator[Float], items: Sequence[object], stage: str, progress: Progress) -> Float:
    """Concatenate parts, reporting progress and raising on non-finite vectors."""
    found: list[Float] = []
    done = 0
    progress(stage, 0, len(items))
    for part in parts:
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            row = done + int(np.flatnonzero(~finite)[0])
            raise ParityError(
                f"{stage}: {int((~finite).sum())} of {len(part)} vectors are not finite, the first for "
                f"{items[row]!r}. This happens if a tower overflows in FP16; try another precision."
            )
        found.append(part)
        done += len(part)
        progress(stage, done, len(items))
    return np.concatenate(found)


def _decoded(source: ImageSource) -> Image.Image:
    try:
        return decode(source.read(), name=source.key)
    except ImageError as error:
        raise ImageError(f"{error} Download the data set again.") from error
