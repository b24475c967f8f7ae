"""Retrieval sets: images, and captions by language that refer to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np

from export.retrieval.metrics import Int, Relevance
from runtime.errors import DatasetError
from runtime.preprocessing.languages import code_among

__all__ = [
    "CaptionChoice",
    "Captions",
    "ImageBytes",
    "ImageOnDisk",
    "ImageSource",
    "MissingImages",
    "RetrievalSet",
    "TarSlice",
    "Translator",
]


class MissingImages(str, Enum):
    """Treatment of listed images that are missing."""

    REFUSE = "refuse"
    DROP = "drop"


class CaptionChoice(str, Enum):
    """Selection of captions for images with several."""

    ALL = "all"
    FIRST = "first"


class Translator(str, Enum):
    """Machine translator of the Portuguese captions to use from CAPIVARA's sets."""

    ALL = "all"
    GOOGLE = "google"
    MARIAN = "marian"


class ImageSource(Protocol):
    """Lazily read image; ``key`` names it within its set."""

    @property
    def key(self) -> str:
        """Name of the image within its set."""

    def read(self) -> bytes:
        """Return the encoded image."""

    def exists(self) -> bool:
        """Return True if the image's file exists; does not open it."""


@dataclass(frozen=True, slots=True)
class ImageOnDisk:
    """Image in a file of its own."""

    key: str
    path: Path

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self.path.read_bytes()

    def exists(self) -> bool:
        """Return True if the file exists."""
        return self.path.is_file()


@dataclass(frozen=True, slots=True)
class TarSlice:
    """Image inside an uncompressed tar file."""

    key: str
    path: Path
    offset_bytes: int
    size_bytes: int

    def read(self) -> bytes:
        """Return the bytes of the tar member."""
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes)
            return file.read(self.size_bytes)

    def exists(self) -> bool:
        """Return True if the tar file exists."""
        return self.path.is_file()


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """Image in memory."""

    key: str
    data: bytes = dataclasses.field(repr=False)

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data

    def exists(self) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions of one language.

    Attributes:
        code: The data set's own language code, unique within the set, such as ``zhm``.
        language: FLORES-200 code from the language map; two codes may share one.
        texts: Captions.
        image_of: Index of each caption's image in the set.
    """

    code: str
    language: str
    texts: tuple[str, ...]
    image_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.image_of) or not self.texts:
            raise DatasetError(
                f"Language {self.code!r} has {len(self.texts)} captions and {len(self.image_of)} image "
                "indices; expected equal numbers, and at least one."
            )


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
        name: Name of the layout.
        images: Candidates in every language, with or without a caption in it.
        captions: One entry per language code.
        notes: Choices and omissions of the reader, for the report.
        credit: Attribution of the images and texts.
    """

    name: str
    images: tuple[ImageSource, ...]
    captions: tuple[Captions, ...]
    notes: tuple[str, ...] = ()
    credit: str = ""

    def __post_init__(self) -> None:
        codes = [captions.code for captions in self.captions]
        if not self.images or not codes or len(set(codes)) != len(codes):
            raise DatasetError(
                f"{self.name} has {len(self.images)} images and languages {codes}; expected at least one "
                "image and one language, and no language twice."
            )

    @property
    def codes(self) -> tuple[str, ...]:
        """Language codes of the data set, in order."""
        return tuple(captions.code for captions in self.captions)

    def relevance(self, captions: Captions) -> Relevance:
        """Return the text→image relevance of one language; reverse it for image→text."""
        images: Int = np.array(captions.image_of, dtype=np.int64)
        return Relevance(np.arange(len(images), dtype=np.int64), images, len(images), len(self.images))

    def select(self, codes: Sequence[str]) -> RetrievalSet:
        """Return the set with only these languages, given by any known code, in the set's order.

        Raises:
            DatasetError: the set has no captions for a code.
        """
        known = {c.code for c in self.captions} | {c.language for c in self.captions}
        wanted = {code_among(code, known) or code for code in codes}
        unknown = wanted - known
        if unknown:
            raise DatasetError(
                f"{self.name} has no captions in {sorted(unknown)}; it has {list(self.codes)}. "
                "Choose from these."
            )
        kept = tuple(c for c in self.captions if c.code in wanted or c.language in wanted)
        return dataclasses.replace(self, captions=kept)

    def sampled(self, captions_per_language: int, *, seed: int = 0) -> RetrievalSet:
        """Return the set with a random sample of the captions of each language, and all images."""
        random = np.random.default_rng(seed)
        kept = []
        for entry in self.captions:
            rows = np.sort(random.permutation(len(entry.texts))[:captions_per_language]).tolist()
            kept.append(
                dataclasses.replace(
                    entry,
                    texts=tuple(entry.texts[row] for row in rows),
                    image_of=tuple(entry.image_of[row] for row in rows),
                )
            )
        return dataclasses.replace(self, captions=tuple(kept))

    def with_present_images(self, missing: MissingImages) -> RetrievalSet:
        """Return the set without missing images and their captions, with a note about it.

        Raises:
            DatasetError: an image is missing and ``missing`` is ``REFUSE``, or all are missing.
        """
        present = [image.exists() for image in self.images]
        absent = [image for image, here in zip(self.images, present, strict=True) if not here]
        if not absent:
            return self
        if missing is MissingImages.REFUSE or len(absent) == len(self.images):
            raise DatasetError(_absent_message(self, absent))
        return _without(self, present)


def _absent_message(dataset: RetrievalSet, absent: Sequence[ImageSource]) -> str:
    first = absent[0]
    place = first.path if isinstance(first, ImageOnDisk | TarSlice) else first.key
    remedy = "Copy or link the images there"
    if len(absent) < len(dataset.images):
        remedy += ", or pass --missing-images drop to exclude them and their captions"
    return (
        f"{dataset.name}: {len(absent)} of {len(dataset.images)} listed images are missing; the first is "
        f"{place}. {remedy}."
    )


def _without(dataset: RetrievalSet, present: Sequence[bool]) -> RetrievalSet:
    new_index = np.cumsum(present) - 1
    images = tuple(image for image, here in zip(dataset.images, present, strict=True) if here)
    captions, n_dropped = [], 0
    for entry in dataset.captions:
        kept = [
            (t, int(new_index[i])) for t, i in zip(entry.texts, entry.image_of, strict=True) if present[i]
        ]
        n_dropped += len(entry.texts) - len(kept)
        if kept:
            texts, image_of = zip(*kept, strict=True)
            captions.append(Captions(entry.code, entry.language, texts, image_of))
    note = (
        f"{len(dataset.images) - len(images)} of {len(dataset.images)} listed images were missing; they and "
        f"their {n_dropped} captions were excluded, so results are not comparable with published ones."
    )
    return dataclasses.replace(dataset, images=images, captions=tuple(captions), notes=(*dataset.notes, note))
