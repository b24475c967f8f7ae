"""Source protocol, reading options and column lookup common to all corpus sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from runtime.corpus.faults import PATIENCE_S, Patience
from runtime.corpus.files import FileSet
from runtime.corpus.rows import NO_COLUMN, Columns, IdType, Needs, Rows
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = [
    "BadFile",
    "CaptionUse",
    "NumberedRows",
    "Reading",
    "Source",
    "SourceFormat",
    "bounded_pieces",
    "chosen_columns",
    "modality_of",
    "usual_column",
]

T = TypeVar("T")

PIECE_TEXTS = 8_192
PIECE_IMAGES = 32
"""Rows that a source yields at once."""

PIECE_BYTES = 16 << 20
"""Size of the cells, in bytes or characters, above which a source yields fewer rows at once."""

ID_NAMES = ("id", "image_id", "key", "__key__")
_TEXT_NAMES = ("text", "caption", "sentence", "txt")
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "image_path")
LANGUAGE_NAMES = ("language", "lang", "flores")
_MOST_NAMES_SHOWN = 40


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


class CaptionUse(str, Enum):
    """Use of a text column that holds lists: the first caption of a row, or each as a row of its own."""

    FIRST = "first"
    EACH = "each"


@dataclass(frozen=True, slots=True)
class Reading:
    """Options of reading a source; what is left out is told by suffixes, byte order marks and headers.

    Attributes:
        delimiter: Character between the fields of a CSV file; default: a tab for ``.tsv``, else a comma.
        quote: Quotation mark of a CSV file, ``"none"`` for files without; default: ``"``.
        escape: Character of a CSV file that makes a following quotation mark part of the text; ``"none"`` if
            there is none; by default, files in which a backslash may be one are refused.
        encoding: Encoding of CSV, JSON lines and text; default: by the byte order mark, else UTF-8.
        captions: Use of a text column that holds lists; by default they are refused.
        id_type: Storage type of the ids; default: integers where every file holds integers, else strings.
        skip_bad_files: Set aside files that are cut off or damaged, with a record, instead of stopping.
        patience_s: Seconds for which a fault of storage is tried again.
    """

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None
    encoding: str | None = None
    captions: CaptionUse | None = None
    id_type: IdType | None = None
    skip_bad_files: bool = False
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        characters = {"delimiter": self.delimiter, "quote": self.quote, "escape": self.escape}
        for name, value in characters.items():
            if value is not None and len(value) != 1 and not (name != "delimiter" and value == "none"):
                raise InputError(f"{name} is {value!r}; expected one character.")
        given = [value for value in characters.values() if value is not None and value != "none"]
        if len(set(given)) < len(given) or (self.escape == '"' and self.quote is None):
            raise InputError(
                f"delimiter, quote and escape are {self.delimiter!r}, {self.quote!r} and {self.escape!r}; "
                "expected different characters. A quotation mark that is written twice needs no escape."
            )
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise InputError(
                    f"Encoding {self.encoding!r} is unknown; expected one of text, such as utf-8, utf-16 or "
                    "latin-1, or one of vectors: float32, float16, int8 or binary."
                ) from None
        if not self.patience_s >= 0:
            raise InputError(f"patience_s is {self.patience_s}; expected seconds, 0 or more.")

    def deciding(self) -> dict[str, Any] | None:
        """Return the options that decide the rows, as plain values; ``None`` if all are the defaults."""
        values = {
            "delimiter": self.delimiter,
            "quote": self.quote,
            "escape": self.escape,
            "encoding": self.encoding,
            "captions": None if self.captions is None else self.captions.value,
            "id_type": None if self.id_type is None else self.id_type.value,
            "skip_bad_files": self.skip_bad_files or None,
        }
        return {name: value for name, value in values.items() if value is not None} or None


@dataclass(frozen=True, slots=True)
class BadFile:
    """File that was set aside: the rows before the damage were read, the others were not."""

    name: str
    n_rows_read: int
    reason: str


class Source(Protocol):
    """Rows in a fixed order; safe to send to another process unless it holds a Python iterable.

    Attributes:
        name: Source as named by the caller.
        format: Storage format.
        columns: Columns in use.
        modality: Modality of the items.
        id_type: Storage type of the ids.
        n_files: Number of files, each a run of rows.
        files: Files behind the source; none of a Python object.
        patience: Repetition of reads that fail.
        bad_files: Files that were set aside so far.
        notes: What was chosen or left out while opening, in words.
    """

    name: str
    format: SourceFormat
    columns: Columns
    modality: Modality
    id_type: IdType
    n_files: int
    files: FileSet
    patience: Patience
    bad_files: list[BadFile]
    notes: list[str]

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


def bounded_pieces(
    items: Iterable[T], most: int, size: Callable[[T], int], most_bytes: int = PIECE_BYTES
) -> Iterator[list[T]]:
    """Group items into lists of at most ``most`` items, and of about ``most_bytes``.

    Where the items end in an error, those before it are yielded first.
    """
    piece: list[T] = []
    n_bytes = 0
    try:
        for item in items:
            piece.append(item)
            n_bytes += size(item)
            if len(piece) == most or n_bytes >= most_bytes:
                yield piece
                piece, n_bytes = [], 0
    except Exception:
        if piece:
            yield piece
        raise
    if piece:
        yield piece


def modality_of(columns: Columns) -> Modality:
    """Return the modality of the columns: texts if a text column is set, otherwise images."""
    return Modality.TEXT if columns.text is not None else Modality.IMAGE


def has_column(names: Sequence[str], column: str) -> bool:
    """Check whether a column, or the struct of a field named with a dot, is among the names."""
    parts = column.split(".")
    return any(".".join(parts[:n]) in names for n in range(len(parts), 0, -1))


def usual_column(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the first usual name among a source's, as it is or in other letters: ``TEXT`` of LAION."""
    exact = next((name for name in usual if name in names), None)
    if exact is not None:
        return exact
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def chosen_columns(asked: Columns, names_of_files: Mapping[str, Sequence[str]]) -> Columns:
    """Choose the columns to read: the requested ones, and the usual names for the rest.

    Args:
        names_of_files: File → its columns. The first file proposes; every file must have what is chosen.

    Raises:
        InputError: a file lacks a column, has it twice, or the column to embed is ambiguous.
    """
    where, names = next(iter(names_of_files.items()))
    for column in (asked.text, asked.image):
        if column is not None and not has_column(names, column):
            raise _no_column(where, column, names)
    text, image = asked.text, asked.image
    if text is None and image is None:
        text = usual_column(names, _TEXT_NAMES)
        image = usual_column(names, _IMAGE_NAMES)
        if (text is None) == (image is None):
            found = "neither texts nor images" if text is None else f"texts ({text!r}) and images ({image!r})"
            raise InputError(
                f"{where} has {found} under their usual names; its columns are {_few(names)}. Choose the "
                f"column to embed with --text COLUMN or --image COLUMN.{_delimiter_hint(names)}"
            )
    used = {text, image}
    language = None if asked.language == NO_COLUMN else asked.language
    if asked.language is None and text is not None:
        language = usual_column(names, LANGUAGE_NAMES)
    id_ = None if asked.id == NO_COLUMN else asked.id
    if asked.id is None:
        id_ = usual_column([name for name in names if name not in used], ID_NAMES)
    columns = Columns(id=id_, text=text, image=image, language=language)
    for file, own in names_of_files.items():
        for role, column in (("id", id_), ("text", text), ("image", image), ("language-column", language)):
            if column is None:
                continue
            if not has_column(own, column):
                is_guess = column not in (asked.id, asked.text, asked.image, asked.language)
                raise _no_column(
                    file, column, own, other=where if file != where else None, role=role, guess=is_guess
                )
            if list(own).count(column) > 1:
                raise InputError(
                    f"{file} has {list(own).count(column)} columns named {column!r}. Rename all but one."
                )
    return columns


def _no_column(
    where: str,
    column: str,
    names: Sequence[str],
    *,
    other: str | None = None,
    role: str = "",
    guess: bool = False,
) -> InputError:
    remedy = "" if other is None else f" {other} has it: pass files of one schema, or rename the column."
    if guess and role in ("id", "language-column"):
        remedy += f" Or pass --{role} none to do without."
    return InputError(
        f"{where} has no column {column!r}; it has {_few(names)}.{remedy}{_delimiter_hint(names)}"
    )


def _few(names: Sequence[str]) -> str:
    shown = [str(name) for name in names[:_MOST_NAMES_SHOWN]]
    more = len(names) - len(shown)
    return f"{shown}" + (f" and {more} more" if more else "")


def _delimiter_hint(names: Sequence[str]) -> str:
    """Say which delimiter a header of a single name seems to have."""
    if len(names) != 1:
        return ""
    found = next((mark for mark in ("\t", ";", "|") if mark in names[0]), None)
    shown = "$'\\t'" if found == "\t" else f"'{found}'"
    return "" if found is None else f" If its fields are separated otherwise, pass --delimiter {shown}."
