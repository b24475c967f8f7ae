"""Source protocol, column lookup and cell checks common to all corpus sources."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import Any, Protocol

from runtime.corpus.rows import Columns, IdType, Needs, Problem, Rows
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = [
    "NumberedRows",
    "Source",
    "SourceFormat",
    "checked_id",
    "checked_language",
    "checked_text",
    "chosen_columns",
]

PIECE_TEXTS = 8_192
PIECE_IMAGES = 32
"""Rows that a source yields at once."""

_ID_NAMES = ("id", "image_id", "key", "__key__")
_TEXT_NAMES = ("text", "caption", "sentence", "txt")
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "image_path")
_LANGUAGE_NAMES = ("language", "lang", "flores")
_INT64 = range(-(2**63), 2**63)


class SourceFormat(str, Enum):
    """Storage format of a corpus."""

    PARQUET = "parquet"
    ARROW = "arrow"
    CSV = "csv"
    JSONL = "jsonl"
    TEXT = "text"
    IMAGES = "images"
    WEBDATASET = "webdataset"
    DATASETS = "datasets"
    ITEMS = "items"


class Source(Protocol):
    """Rows in a fixed order; safe to send to another process unless it holds a Python iterable.

    Attributes:
        name: Source as named by the caller.
        format: Storage format.
        columns: Columns in use.
        modality: Modality of the items.
        id_type: Storage type of the ids.
        n_files: Number of files, each a run of rows.
    """

    name: str
    format: SourceFormat
    columns: Columns
    modality: Modality
    id_type: IdType
    n_files: int

    def identity(self) -> str:
        """Return a string that changes with the source's files and sizes."""

    def n_rows(self, file: int) -> int | None:
        """Return the rows of a file, or ``None`` if it must be read to count them."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield the rows of a file, numbered from 0 within the file.

        Rows that are not needed may be skipped if ``n_rows`` of the file is known.
        """


class NumberedRows:
    """Rows of all files, numbered consecutively; rows that are not needed may be skipped.

    Args:
        first_file: File to start with; its first row has number ``first_row``.

    Attributes:
        n_rows: Rows of the whole source, after iterating over them.
    """

    def __init__(self, source: Source, needs: Needs, *, first_file: int = 0, first_row: int = 0) -> None:
        self._source, self._needs, self._first_file = source, needs, first_file
        self.n_rows = first_row

    def __iter__(self) -> Iterator[Rows]:
        for file in range(self._first_file, self._source.n_files):
            offset, count = self.n_rows, self._source.n_rows(file)
            if count is None or self._needs(offset, offset + count):
                yield from self._read(file, offset)
            if count is not None:
                self.n_rows = offset + count

    def _read(self, file: int, offset: int) -> Iterator[Rows]:
        def needs(start: int, stop: int) -> bool:
            return self._needs(offset + start, offset + stop)

        for rows in self._source.read(file, needs):
            self.n_rows = offset + rows.stop
            if needs(rows.start, rows.stop):
                yield Rows(offset + rows.start, rows.ids, rows.items, rows.languages)


def chosen_columns(asked: Columns, names: list[str], *, where: str) -> Columns:
    """Choose the columns to read: the requested ones, and the usual names for the rest.

    Raises:
        InputError: a column is missing, or the column to embed is ambiguous.
    """
    for column in (asked.id, asked.text, asked.image, asked.language):
        if column is not None and column not in names:
            raise InputError(f"{where} has no column {column!r}; it has {names}.")
    text, image = asked.text, asked.image
    if text is None and image is None:
        text = next((name for name in _TEXT_NAMES if name in names), None)
        image = next((name for name in _IMAGE_NAMES if name in names), None)
        if (text is None) == (image is None):
            found = "neither texts nor images" if text is None else f"texts ({text!r}) and images ({image!r})"
            raise InputError(
                f"{where} has {found} under their usual names; its columns are {names}. Choose the column to "
                "embed with --text COLUMN or --image COLUMN."
            )
    used = {asked.text, asked.image, text, image}
    language = asked.language
    if language is None and text is not None:
        language = next((name for name in _LANGUAGE_NAMES if name in names), None)
    id_ = asked.id or next((name for name in _ID_NAMES if name in names and name not in used), None)
    return Columns(id=id_, text=text, image=image, language=language)


def checked_id(value: Any, id_type: IdType) -> Any | Problem:
    """Return an id as stored, or the problem with it."""
    if value is None:
        return Problem("null-id", "The id is null.")
    if isinstance(value, str) and id_type is IdType.STRING:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if id_type is IdType.STRING:
            return str(value)
        if value in _INT64:
            return value
    return Problem(
        "wrong-id", f"The id {value!r} is of type {type(value).__name__}; expected {id_type.value}."
    )


def checked_text(value: Any) -> str | Problem:
    """Return a text, or the problem with it; blank texts are rejected."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' null
        return Problem("null-text", "The text is null.")
    if not isinstance(value, str):
        return Problem("not-text", f"The text is of type {type(value).__name__}; expected a string.")
    if not value:
        return Problem("empty-text", "The text is empty.")
    if value.isspace():
        return Problem("empty-text", f"The text has blank characters only ({len(value)}).")
    return value


def checked_language(value: Any) -> str | Problem | None:
    """Return a language code, ``None`` if it is left out or blank, or the problem with it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' null
        return None
    if not isinstance(value, str):
        return Problem(
            "unknown-language", f"The language is of type {type(value).__name__}; expected a code."
        )
    return value if value and not value.isspace() else None
