"""Checks of single cells: ids, texts, language codes and images; a bad cell is its row's problem."""

from __future__ import annotations

import base64
import binascii
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.corpus.faults import without_query
from runtime.corpus.files import filesystem_from_location
from runtime.corpus.rows import IdType, ImageFile, Item, Problem
from runtime.errors import InputError

__all__ = [
    "MOST_CHARACTERS",
    "SKIPPED_AT_ONCE",
    "are_int64",
    "checked_id",
    "checked_language",
    "checked_text",
    "image_from_cell",
    "too_long",
    "value_at",
]

MOST_CHARACTERS = 1 << 26
"""Length of a text, or of a line of a file, above which its row is bad: it would be held as a whole."""

SKIPPED_AT_ONCE = 1 << 20
"""Characters that are read at once of a line that is too long."""

_INT64 = range(-(2**63), 2**63)
_BYTES = (bytes, bytearray, memoryview)


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """Return a cell by name; a name with dots that is no column leads into nested mappings."""
    if column in record or "." not in column:
        return record.get(column)
    value: Any = record
    parts = column.split(".")
    while parts:
        if not isinstance(value, Mapping):
            return None
        n = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in value), None)
        if n is None:
            return None
        value, parts = value[".".join(parts[:n])], parts[n:]
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is _pandas_na()


def _pandas_na() -> Any:
    import sys

    pandas = sys.modules.get("pandas")
    return _is_null if pandas is None else getattr(pandas, "NA", _is_null)


def checked_id(value: Any, id_type: IdType) -> Any | Problem:
    """Return an id as stored, or the problem with it; whole floats are stored as integers are."""
    if isinstance(value, str) and id_type is IdType.STRING:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if id_type is IdType.STRING:
            return str(value)
        if value in _INT64:
            return value
    if _is_null(value):
        return Problem("null-id", "The id is null.")
    if isinstance(value, float):
        if id_type is IdType.STRING:
            return str(int(value)) if value.is_integer() else repr(value)
        if value.is_integer() and int(value) in _INT64:
            return int(value)
    if isinstance(value, _BYTES) and id_type is IdType.STRING:
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return Problem("wrong-id", f"The id {bytes(value)[:32]!r} is not UTF-8.")
    if isinstance(value, uuid.UUID) and id_type is IdType.STRING:
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Problem(
            "wrong-id",
            f"The id {str(value)[:64]} is beyond what int64 holds. Pass --id-type string to store every id "
            "as text.",
        )
    remedy = " Pass --id-type string to store every id as text." if id_type is IdType.INT64 else ""
    return Problem(
        "wrong-id",
        f"The id {str(value)[:64]!r} is of type {type(value).__name__}; expected {id_type.value}.{remedy}",
    )


def are_int64(values: Iterable[Any]) -> bool:
    """Check whether all values are integers that int64 holds."""
    return all(isinstance(v, int) and not isinstance(v, bool) and v in _INT64 for v in values)


def too_long(n: int, what: str, unit: str = "characters") -> Problem:
    """Return the problem of a row with a text or line that is too long."""
    return Problem("too-long-text", f"The {what} has {n:,} {unit}; at most {MOST_CHARACTERS:,} are read.")


def checked_text(value: Any) -> str | Problem:
    """Return a text, or the problem with it; blank and overlong texts are rejected."""
    if isinstance(value, (str, *_BYTES)) and len(value) > MOST_CHARACTERS:
        return too_long(len(value), "text", "characters" if isinstance(value, str) else "bytes")
    if isinstance(value, _BYTES):
        value = bytes(value).decode("utf-8", "surrogateescape")  # other bytes are found when it is tokenized
    if isinstance(value, str):
        if not value:
            return Problem("empty-text", "The text is empty.")
        if value.isspace():
            return Problem("empty-text", f"The text has blank characters only ({len(value)}).")
        return value
    if _is_null(value):
        return Problem("null-text", "The text is null.")
    return Problem("not-text", f"The text is of type {type(value).__name__}; expected a string.")


def checked_language(value: Any) -> str | Problem | None:
    """Return a language code, ``None`` if it is left out or blank, or the problem with it."""
    if isinstance(value, _BYTES):
        value = bytes(value).decode("utf-8", "replace")
    if isinstance(value, str):
        return value if value and not value.isspace() else None
    if _is_null(value):
        return None
    return Problem("unknown-language", f"The language is of type {type(value).__name__}; expected a code.")


def image_from_cell(cell: Any, filesystem: Any, folder: str) -> Item:
    """Return the bytes, or the file to read, of a cell with bytes, a path, or a struct of either."""
    if isinstance(cell, Problem):
        return cell
    if isinstance(cell, Mapping):
        data = cell.get("bytes")
        cell = data if data is not None else cell.get("path")
    if isinstance(cell, _BYTES):
        return bytes(cell)
    if isinstance(cell, str):
        return _image_from_text(cell, filesystem, folder)
    if _is_null(cell):
        return Problem("null-image", "The image is null.")
    return Problem(
        "not-image",
        f"The image is of type {type(cell).__name__}; expected bytes, a path, or a struct of either.",
    )


def _image_from_text(cell: str, filesystem: Any, folder: str) -> Item:
    if not cell:
        return Problem("null-image", "The image's path is empty.")
    if cell.startswith("data:"):
        return _image_from_data_url(cell)
    if "://" in cell:
        try:
            return ImageFile(*filesystem_from_location(cell))
        except InputError as error:
            if isinstance(error.__cause__, ImportError):
                raise  # every such row would fail: the package is missing here
            return Problem("malformed-url", f"The image's address is malformed: {without_query(str(error))}")
    if "\0" in cell:
        return Problem("malformed-url", "The image's path holds a NUL character.")
    if cell.startswith("/"):
        return ImageFile(filesystem, cell)
    return ImageFile(filesystem, f"{folder}/{cell}")


def _image_from_data_url(cell: str) -> Item:
    head, comma, data = cell.partition(",")
    if not comma or not head.endswith(";base64"):
        return Problem("malformed-url", "The image's data: URL is not in base64.")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        return Problem("malformed-url", f"The image's data: URL is malformed: {error}.")
