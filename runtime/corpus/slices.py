"""Slices of a part before and after preparation, and the preparation that local and remote encoders share."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.pictures import Picture
from runtime.corpus.rows import Item, Problem, Rows
from runtime.errors import LanguageError
from runtime.preprocessing.languages import flores_from_code

__all__ = [
    "BAD",
    "Batch",
    "Counts",
    "LanguageCheck",
    "Preparation",
    "PreparedSlice",
    "Slice",
    "digest_of_part",
    "digest_of_rows",
    "prepared_images",
]

BAD = -1
"""Vector row of a bad row."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts over rows; ``tokens`` includes special tokens but no padding."""

    rows: int = 0
    bad: int = 0
    duplicates: int = 0
    truncated: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    images: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            **{name: getattr(self, name) + getattr(other, name) for name in Counts.__dataclass_fields__}
        )


class Batch(Protocol):
    """Rows that are embedded together.

    Attributes:
        rows: int64 (n,): row numbers of the vectors.
        counts: Tokens and images that the batch computes.
    """

    @property
    def rows(self) -> NDArray[np.int64]: ...

    @property
    def counts(self) -> Counts: ...

    def run(self, encoder: Any, dim: int) -> NDArray[np.float32]:
        """Embed the rows with the encoder they were prepared for: float32 (n, dim)."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one part before preparation.

    Attributes:
        part: Number of the part.
        same_as: Row → earlier row of the part with the same content.
        content: Hashes of the images as they were read, in row order; see ``digest_of_rows``.
        pictures: Image files behind a path column, as they were read.
    """

    part: int
    rows: Rows
    same_as: dict[int, int] = field(default_factory=dict)
    content: bytes = b""
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedSlice:
    """Prepared slice, ready to run.

    Attributes:
        ids: One per row.
        vector_row: int64 (rows,): row whose vector each row uses, usually itself; -1 for bad rows.
        problems: Row → problem, for bad rows.
        batches: Batches that hold every distinct good row exactly once.
        content: Hash of what was read for the rows: ids, texts or images, languages.
        pictures: Image files behind a path column, as they were read.
    """

    part: int
    start: int
    ids: list[Any]
    vector_row: NDArray[np.int64]
    problems: dict[int, Problem]
    batches: Sequence[Batch]
    counts: Counts
    content: bytes = b""
    pictures: tuple[Picture, ...] = ()


class Preparation(Protocol):
    """Preparation of slices before the tower."""

    def deduplicated(self, rows: Iterator[tuple[int, Rows]]) -> Iterator[Slice]:
        """Yield slices in order, marking the duplicates that can be found before preparation."""

    def prepared(self, piece: Slice) -> PreparedSlice:
        """Tokenize or decode a slice; may run on several threads at once."""

    def shortened(self, rows: Iterator[Rows]) -> Iterator[Rows]:
        """Cut texts to what their tokens can come from, before rows are gathered into slices."""


class LanguageCheck:
    """Cached check of language codes: an encoder is asked about each code once.

    Args:
        ask: Embeds or tokenizes a text in a language; raises a ``LanguageError`` for one that it rejects.
    """

    def __init__(self, ask: Callable[[str | None], object]) -> None:
        self._ask = ask
        self._problems: dict[str | None, Problem | None] = {}

    def problem(self, code: str | None) -> Problem | None:
        """Return the problem of a language code, or None for a language that the encoder supports."""
        if code not in self._problems:
            self._problems[code] = self._new_problem(code)
        return self._problems[code]

    def _new_problem(self, code: str | None) -> Problem | None:
        try:
            self._ask(code)
        except LanguageError as error:
            return Problem(_kind_of_language(code), str(error))
        return None


def prepared_images(
    piece: Slice,
    check: Callable[[int, Item], Any | Problem],
    batch: Callable[[list[Any], NDArray[np.int64]], Batch],
) -> PreparedSlice:
    """Check the images of a slice that are not duplicates, and make one batch of the good ones.

    Args:
        check: Row number and item → what the batch is made of, or the row's problem.
        batch: Makes the batch, from the checked items and their row numbers.
    """
    rows = piece.rows
    vector_row = np.arange(rows.start, rows.stop, dtype=np.int64)
    problems: dict[int, Problem] = {}
    good, numbers = [], []
    for number, item in zip(range(rows.start, rows.stop), rows.items, strict=True):
        if number in piece.same_as:
            vector_row[number - rows.start] = piece.same_as[number]
            continue
        found = check(number, item)
        if isinstance(found, Problem):
            problems[number] = found
            vector_row[number - rows.start] = BAD
        else:
            good.append(found)
            numbers.append(number)
    batches = [batch(good, np.asarray(numbers, dtype=np.int64))] if good else []
    counts = Counts(len(rows), len(problems), len(piece.same_as))
    content = digest_of_rows(rows, piece.content)
    return PreparedSlice(
        piece.part, rows.start, rows.ids, vector_row, problems, batches, counts, content, piece.pictures
    )


def digest_of_rows(rows: Rows, images: bytes | None = None) -> bytes:
    """Return a hash of what was read for rows: ids, texts, languages and kinds of problems, in order.

    Args:
        images: Hashes of the images, in place of the items.
    """
    digest = blake2b(digest_size=16)
    # version 2 writes equal values as equal bytes; later ones also write which objects are shared
    digest.update(marshal.dumps([rows.ids, rows.languages], 2))
    if images is not None:
        digest.update(images)
    else:
        problems = Problem in {*map(type, rows.items)}
        items = [(i.kind,) if isinstance(i, Problem) else i for i in rows.items] if problems else rows.items
        digest.update(marshal.dumps(list(items), 2))
    return digest.digest()


def digest_of_part(contents: Sequence[bytes]) -> str:
    """Return the hash of a part from those of its slices, in order."""
    return blake2b(b"".join(contents), digest_size=16).hexdigest()


def _kind_of_language(code: str | None) -> str:
    """Return the kind of problem of a language code that a tower rejects."""
    if code is None:
        return "missing-language"
    try:
        flores_from_code(code)
    except LanguageError:
        return "unknown-language"
    return "unspoken-language"
