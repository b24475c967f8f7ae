"""What every layout is read into: images, and captions that point at them, by language."""

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
    """What to do about images that are listed but absent."""

    REFUSE = "refuse"
    DROP = "drop"


class CaptionChoice(str, Enum):
    """Which captions of an image count, where it has several."""

    ALL = "all"
    FIRST = "first"


class Translator(str, Enum):
    """Which machine translator's Portuguese captions count in CAPIVARA's sets."""

    ALL = "all"
    GOOGLE = "google"
    MARIAN = "marian"


class ImageSource(Protocol):
    """An image that is read when asked for; ``key`` names it within its set."""

    @property
    def key(self) -> str:
        """Name of the image within its set."""

    def read(self) -> bytes:
        """The encoded image."""

    def exists(self) -> bool:
        """Whether it can be read; opens nothing."""


@dataclass(frozen=True, slots=True)
class ImageOnDisk:
    """An image in a file of its own."""

    key: str
    path: Path

    def read(self) -> bytes:
        """The file's bytes."""
        return self.path.read_bytes()

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()


@dataclass(frozen=True, slots=True)
class TarSlice:
    """An image inside an uncompressed tar."""

    key: str
    path: Path
    offset_bytes: int
    size_bytes: int

    def read(self) -> bytes:
        """The member's bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes)
            return file.read(self.size_bytes)

    def exists(self) -> bool:
        """Whether the tar is there."""
        return self.path.is_file()


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image in memory."""

    key: str
    data: bytes = dataclasses.field(repr=False)

    def read(self) -> bytes:
        """The bytes."""
        return self.data

    def exists(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one language.

    Attributes:
        code: The data set's own code, unique within the set; ``zhm``.
        language: FLORES-200 code by the language map in use; two codes may share one.
        texts: The captions.
        image_of: For each caption, the index of its image in the set.
    """

    code: str
    language: str
    texts: tuple[str, ...]
    image_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.image_of) or not self.texts:
            raise DatasetError(
                f"Language {self.code!r} has {len(self.texts)} captions and {len(self.image_of)} image "
                "indices; expected as many, and at least one."
            )


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
        name: Name of the layout.
        images: All of them are candidates in every language, with a caption in it or not.
        captions: One entry a language code.
        notes: What the reader chose or left out, for the report.
        credit: Whose images and texts these are, for whatever shows them.
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
        """The data set's own language codes, in order."""
        return tuple(captions.code for captions in self.captions)

    def relevance(self, captions: Captions) -> Relevance:
        """Text→image relevance of one language; reverse it for image→text."""
        images: Int = np.array(captions.image_of, dtype=np.int64)
        return Relevance(np.arange(len(images), dtype=np.int64), images, len(images), len(self.images))

    def select(self, codes: Sequence[str]) -> RetrievalSet:
        """The same set in some languages, named by own or any language code, in the set's order.

        Raises:
            DatasetError: a code that the set does not hold.
        """
        known = {c.code for c in self.captions} | {c.language for c in self.captions}
        wanted = {code_among(code, known) or code for code in codes}
        unknown = wanted - known
        if unknown:
            raise DatasetError(
                f"{self.name} has no captions in {sorted(unknown)}; it has {list(self.codes)}. "
                "Name some of these."
            )
        kept = tuple(c for c in self.captions if c.code in wanted or c.language in wanted)
        return dataclasses.replace(self, captions=kept)

    def sampled(self, captions_per_language: int, *, seed: int = 0) -> RetrievalSet:
        """The same images, and that many captions of each language, drawn at random."""
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
        """The set without absent images and, in every language, without their captions; with a note of it.

        Raises:
            DatasetError: an image is absent and ``missing`` refuses that, or all are absent.
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
    remedy = "Put or link the images there"
    if len(absent) < len(dataset.images):
        remedy += ", or pass --missing-images drop to leave out their captions too"
    return (
        f"{dataset.name}: {len(absent)} of {len(dataset.images)} listed images are absent; the first is "
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
        f"{len(dataset.images) - len(images)} of {len(dataset.images)} listed images were absent; they and "
        f"their {n_dropped} captions were left out, so figures do not compare with published ones."
    )
    return dataclasses.replace(dataset, images=images, captions=tuple(captions), notes=(*dataset.notes, note))
