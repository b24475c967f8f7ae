"""Input rows of a corpus: numbered, each with its item or its problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from runtime.corpus.faults import FaultKind, fault_kind, without_query
from runtime.corpus.reading import Stamp, fetched, is_local
from runtime.errors import InputError, InputFaultError

__all__ = [
    "NO_COLUMN",
    "BadRow",
    "Columns",
    "IdType",
    "ImageFile",
    "Item",
    "Needs",
    "Problem",
    "Rows",
    "slices_from_rows",
    "undecodable",
]

NO_COLUMN = "none"
"""Name that asks for no column, in place of one under a usual name."""

Needs: TypeAlias = "Callable[[int, int], bool]"
"""Predicate: is any row in ``start <= row < stop`` needed? A source may skip other rows."""


class IdType(str, Enum):
    """Storage type of ids."""

    STRING = "string"
    INT64 = "int64"


@dataclass(frozen=True, slots=True)
class Problem:
    """Reason a row cannot be embedded.

    Attributes:
        kind: Fixed keyword.
        reason: Sentence.
        may_pass: True for a fault of storage: the row's part is left undone, and the row is not called bad.
    """

    kind: str
    reason: str
    may_pass: bool = False


def undecodable(text: str, error: Exception) -> Problem:
    """Return the problem of a text with half characters; those of other bytes than UTF-8 name the remedy."""
    is_foreign = any("\udc80" <= character <= "\udcff" for character in text)
    remedy = " If the file is of another encoding, pass it: --text-encoding cp1252." if is_foreign else ""
    return Problem("undecodable-text", f"{error}{remedy}")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Image file that has not been read yet.

    Attributes:
        is_listed: True if the file was found by listing its folder, so that its absence is a fault of
        storage.
    """

    filesystem: Any
    path: str
    is_listed: bool = False

    def fetched(self) -> tuple[bytes, Stamp]:
        """Read the file once; errors are those of its file system."""
        return fetched(self.filesystem, self.path)

    def read(self) -> bytes | Problem:
        """Read the file once, and return its bytes or the problem with it.

        Raises:
            InputFaultError: storage failed.
        """
        try:
            return self.fetched()[0]
        except Exception as error:
            problem = self.problem_of(error)
            if problem is None:
                raise InputFaultError(
                    f"The image {without_query(self.path)} cannot be read: {error}."
                ) from error
            return problem

    @property
    def target(self) -> str:
        """Path that a local link leads to; else the path."""
        is_link = is_local(self.filesystem) and os.path.islink(self.path)  # noqa: PTH114 - any string
        return os.path.realpath(self.path) if is_link else self.path

    @property
    def words_on_absence(self) -> str:
        """Say that the file does not exist, and of a link that its target does not, without a full stop."""
        shown = without_query(self.path)
        if self.target != self.path:
            return f"The image {shown} is a link to {self.target}, which does not exist"
        return f"The image {shown} does not exist"

    def problem_of(self, error: Exception) -> Problem | None:
        """Return the row's own problem for an error of reading, or ``None`` for a fault of storage."""
        match fault_kind(error):
            case FaultKind.ABSENT:
                return Problem("missing-file", f"{self.words_on_absence}.")
            case FaultKind.OWN:
                shown = without_query(f"{self.path} cannot be read: {error}")
                return Problem("unreadable-file", f"The image {shown}.")
        return None


Item: TypeAlias = Any
"""Text, bytes, ``ImageFile``, ``runtime.preprocessing.image.Snapshot``, or ``Problem``."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a source.

    Attributes:
        start: Number of the first row, from 0.
        ids: One per row; ``None`` only if the item is a problem.
        items: Texts; encoded images, image files or snapshots of a caller's images; or problems.
        languages: One code per row (``None``: not given), or ``None`` if there are no languages.
    """

    start: int
    ids: list[Any]
    items: list[Item]
    languages: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def stop(self) -> int:
        """Row number after the last row."""
        return self.start + len(self.items)

    def cut(self, start: int, stop: int) -> Rows:
        """Return the rows numbered ``start <= row < stop``."""
        part = slice(start - self.start, stop - self.start)
        languages = None if self.languages is None else self.languages[part]
        return Rows(start, self.ids[part], self.items[part], languages)


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row of the table of bad rows."""

    id: Any
    row: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names; columns left out are looked up under their usual names.

    A field of a struct is named with a dot: ``meta.caption``.

    Attributes:
        id: Ids; row numbers are used if there is no such column, or for ``"none"``.
        text: Texts, for the text tower.
        image: Images (bytes, a struct with ``bytes`` or ``path``, or a path), for the image tower.
        language: A language code for each text; ``"none"`` leaves a column under a usual name alone.
    """

    id: str | None = None
    text: str | None = None
    image: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.image is not None:
            raise InputError(
                f"A run embeds texts or images, not both; got text column {self.text!r} and image column "
                f"{self.image!r}. Pass one of them, and run twice for both."
            )


def slices_from_rows(rows: Iterator[Rows], *, size: int, boundary: int) -> Iterator[Rows]:
    """Regroup rows into slices of ``size`` rows that never cross a multiple of ``boundary``.

    Slices start at multiples of ``size`` after each boundary, whatever pieces the source delivers, so
    results do not depend on the layout of a file or on where reading began.
    """
    held: list[Rows] = []
    for piece in rows:
        at = piece.start
        if held and held[-1].stop != at:
            yield _joined(held)
            held = []
        while at < piece.stop:
            stop = min(_slice_stop(at, size, boundary), piece.stop)
            held.append(piece.cut(at, stop))
            if stop == _slice_stop(at, size, boundary):
                yield _joined(held)
                held = []
            at = stop
    if held:
        yield _joined(held)


def _slice_stop(row: int, size: int, boundary: int) -> int:
    part_start = row - row % boundary
    return min(row - (row - part_start) % size + size, part_start + boundary)


def _joined(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    languages = None
    if pieces[0].languages is not None:
        languages = [code for piece in pieces for code in piece.languages or ()]
    return Rows(
        pieces[0].start,
        [i for piece in pieces for i in piece.ids],
        [item for piece in pieces for item in piece.items],
        languages,
    )
