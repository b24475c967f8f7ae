"""Input rows of a corpus: numbered, each with its item or its problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from runtime.errors import InputError

__all__ = ["BadRow", "Columns", "IdType", "ImageFile", "Item", "Needs", "Problem", "Rows", "slices_from_rows"]

Needs: TypeAlias = "Callable[[int, int], bool]"
"""Predicate: is any row in ``start <= row < stop`` needed? A source may skip other rows."""


class IdType(str, Enum):
    """Storage type of ids."""

    STRING = "string"
    INT64 = "int64"


@dataclass(frozen=True, slots=True)
class Problem:
    """Reason a row cannot be embedded; ``kind`` is a fixed keyword, ``reason`` a sentence."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Image file that has not been read yet."""

    filesystem: Any
    path: str

    def read(self) -> bytes | Problem:
        """Return the file's bytes, or the problem with it."""
        try:
            with self.filesystem.open_input_file(self.path) as file:
                data: bytes = file.read()
        except FileNotFoundError:
            return Problem("missing-file", f"The image {self.path} does not exist.")
        except OSError as error:
            return Problem("unreadable-file", f"The image {self.path} cannot be read: {error}.")
        return data


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

    Attributes:
        id: Ids; row numbers are used if there is no such column.
        text: Texts, for the text tower.
        image: Images (bytes, a struct with ``bytes`` or ``path``, or a path), for the image tower.
        language: A language code for each text.
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
