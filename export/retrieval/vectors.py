"""Embed a retrieval set twice: by the family's own library in PyTorch, and by the exported model.

Each distinct (text, language) is embedded once; a tower without language tokens sees the text alone. PyTorch
gets its own library's token ids, cut to the longest text of a batch of like lengths: the library itself pads
to the whole context, which takes up to ten times as long and moves a vector by about 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from export.retrieval.metrics import Float, Int
from export.retrieval.sets import Captions, ImageSource, RetrievalSet
from runtime.encoder import Encoder
from runtime.errors import ImageError, LanguageError, ParityError
from runtime.preprocessing.batching import batches_from_rows, windows
from runtime.preprocessing.image import decode

if TYPE_CHECKING:  # they come with torch, which a page of finished figures does not need
    from export.towers import Reference, Towers

__all__ = [
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
"""Called with what is being embedded, how many are done, and of how many."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Report no progress."""


REFERENCE_PADDING = "to the longest text of a batch"
"""For the record; see the module's docstring."""

_WINDOW = 2_048
_BATCH_TOKENS = 1_024
_BATCH_IMAGES = 32


@dataclass(frozen=True, slots=True, eq=False)
class TextIndex:
    """The distinct texts of a set, and where each language's captions stand among them.

    Attributes:
        texts: Distinct texts.
        languages: The FLORES-200 code of each, or ``None`` where the tower takes none.
        rows: By the captions' code, int64 (captions,): rows of ``texts``.
    """

    texts: tuple[str, ...]
    languages: tuple[str | None, ...]
    rows: dict[str, Int]

    @classmethod
    def of(cls, dataset: RetrievalSet, *, with_language: bool) -> TextIndex:
        """Index a set's captions."""
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
        """Index texts of one language, under a code."""
        row_of: dict[str, int] = {}
        rows = np.array([row_of.setdefault(text, len(row_of)) for text in texts], dtype=np.int64)
        return cls(tuple(row_of), (language,) * len(row_of), {code: rows})


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A set, embedded: float32 unit vectors, images (images, dim) and distinct texts (texts, dim)."""

    images: Float
    texts: Float
    index: TextIndex

    def of(self, captions: Captions) -> Float:
        """float32 (captions, dim): one language's captions."""
        return self.texts[self.index.rows[captions.code]]


def spoken_part(dataset: RetrievalSet, towers: Towers) -> tuple[RetrievalSet, tuple[str, ...]]:
    """The languages that the tower has tokens for, and the codes of the others.

    A tower that takes no language is asked for all of them, learnt or not.

    Raises:
        LanguageError: it has tokens for none.
    """
    if not towers.text_preprocessing.needs_language:
        return dataset, ()
    known = towers.text_preprocessing.language_ids
    spoken = [entry.code for entry in dataset.captions if entry.language in known]
    if not spoken:
        raise LanguageError(
            f"The text tower has language tokens for none of {list(dataset.codes)}; it has {sorted(known)}. "
            "Choose another language map or data set."
        )
    return dataset.select(spoken), tuple(code for code in dataset.codes if code not in spoken)


def reference_vectors(
    reference: Reference,
    dataset: RetrievalSet,
    index: TextIndex,
    *,
    dim: int,
    pad_id: int,
    progress: Progress,
    max_batch_tokens: int = _BATCH_TOKENS,
    batch_images: int = _BATCH_IMAGES,
) -> Vectors:
    """Embed with the family's own library, ``dim`` wide.

    Raises:
        ImageError: an image cannot be decoded.
        ParityError: a vector is not finite.
    """
    images = _reference_images(reference, dataset.images, dim, batch_images)
    return Vectors(
        _joined(images, dataset.images, "PyTorch images", progress),
        reference_text_vectors(
            reference, index, dim=dim, pad_id=pad_id, progress=progress, max_batch_tokens=max_batch_tokens
        ),
        index,
    )


def reference_text_vectors(
    reference: Reference,
    index: TextIndex,
    *,
    dim: int,
    pad_id: int,
    progress: Progress,
    max_batch_tokens: int = _BATCH_TOKENS,
) -> Float:
    """float32 (distinct texts, dim): the texts alone, by the family's own library."""
    texts = _reference_texts(reference, index, dim, pad_id, max_batch_tokens)
    return _joined(texts, index.texts, "PyTorch texts", progress)


def reference_image_vectors(
    reference: Reference, images: Sequence[ImageSource], *, dim: int, progress: Progress
) -> Float:
    """float32 (images, dim): the images alone, by the family's own library."""
    return _joined(
        _reference_images(reference, images, dim, _BATCH_IMAGES), images, "PyTorch images", progress
    )


def exported_vectors(
    encoder: Encoder, dataset: RetrievalSet, index: TextIndex, *, dim: int, progress: Progress
) -> Vectors:
    """Embed with the exported model, strings and encoded images in.

    Raises:
        BabeltowerError: whatever the encoder raises.
        ParityError: a vector is not finite.
    """
    texts = exported_text_vectors(encoder, index, dim=dim, progress=progress)
    return Vectors(exported_image_vectors(encoder, dataset.images, dim=dim, progress=progress), texts, index)


def exported_text_vectors(encoder: Encoder, index: TextIndex, *, dim: int, progress: Progress) -> Float:
    """float32 (distinct texts, dim): the texts alone, by the exported model."""
    return _joined(_exported_texts(encoder, index, dim), index.texts, "exported texts", progress)


def exported_image_vectors(
    encoder: Encoder, images: Sequence[ImageSource], *, dim: int, progress: Progress
) -> Float:
    """float32 (images, dim): the images alone, by the exported model."""
    sources = (image.read() for image in images)
    vectors = encoder.iter_images(sources, dim=dim, batch_size=_BATCH_IMAGES)
    return _joined(vectors, images, "exported images", progress)


def _reference_texts(
    reference: Reference, index: TextIndex, dim: int, pad_id: int, max_batch_tokens: int
) -> Iterator[Float]:
    for window in windows(zip(index.texts, index.languages, strict=True), _WINDOW):
        texts, languages = zip(*window, strict=True)
        ids = reference.token_ids(texts, languages)
        rows = [row[: _length(row, pad_id)].tolist() for row in ids]
        vectors: list[tuple[Int, Float]] = []
        for batch in batches_from_rows(rows, pad_id=pad_id, max_batch_tokens=max_batch_tokens):
            vectors.append((batch.positions, reference.text_vectors(batch.input_ids)[dim]))
        order = np.argsort(np.concatenate([positions for positions, _ in vectors]))
        yield np.concatenate([part for _, part in vectors])[order]


def _reference_images(
    reference: Reference, images: Sequence[ImageSource], dim: int, batch_size: int
) -> Iterator[Float]:
    for batch in windows(images, batch_size):
        pixels = np.stack([reference.pixels(_decoded(image)) for image in batch])
        yield reference.image_vectors(pixels)[dim]


def _exported_texts(encoder: Encoder, index: TextIndex, dim: int) -> Iterator[Float]:
    for window in windows(zip(index.texts, index.languages, strict=True), _WINDOW):
        texts, languages = zip(*window, strict=True)
        spoken = [language for language in languages if language is not None]
        yield encoder.embed_texts(texts, spoken if len(spoken) == len(texts) else None, dim=dim)


def _joined(parts: Iterator[Float], items: Sequence[object], stage: str, progress: Progress) -> Float:
    """Concatenate parts, reporting progress and refusing what is not finite."""
    found: list[Float] = []
    done = 0
    progress(stage, 0, len(items))
    for part in parts:
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            row = done + int(np.flatnonzero(~finite)[0])
            raise ParityError(
                f"{stage}: {int((~finite).sum())} of {len(part)} vectors are not finite, the first for "
                f"{items[row]!r}. A tower that overflows in FP16 does this: try another precision."
            )
        found.append(part)
        done += len(part)
        progress(stage, done, len(items))
    return np.concatenate(found)


def _decoded(source: ImageSource) -> Image.Image:
    try:
        return decode(source.read(), name=source.key)
    except ImageError as error:
        raise ImageError(f"{error} Fetch the data set again.") from error


def _length(row: Int, pad_id: int) -> int:
    own = np.flatnonzero(row != pad_id)
    return int(own[-1]) + 1 if own.size else 1
