"""CSV, JSON lines and plain text, read line by line; an unparsable line is a bad row."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

from runtime.corpus.files import FileSet
from runtime.corpus.locations import partitions_of
from runtime.corpus.rows import Columns, IdType, Needs, Problem, Rows
from runtime.corpus.sources.base import (
    PIECE_TEXTS,
    CaptionUse,
    Reading,
    SourceFormat,
    bounded_pieces,
    chosen_columns,
    has_column,
    modality_of,
)
from runtime.corpus.sources.cells import MOST_CHARACTERS, SKIPPED_AT_ONCE, are_int64, too_long, value_at
from runtime.corpus.sources.csv_rows import header_of_csv, records_of_csv, rows_of_csv
from runtime.corpus.sources.opened import SourceFiles
from runtime.corpus.sources.records import Cells
from runtime.corpus.sources.text_lines import texts_of_lines
from runtime.errors import DamagedFileError, InputError

__all__ = ["LineSource"]

_LINES_ONLY = Columns(text="text")

_SAMPLE_LINES = 64
"""JSON lines of each file that are looked at for column names, and rows of CSV for ambiguous escapes."""

_REPORTED_LATER = (DamagedFileError, csv.Error, UnicodeDecodeError, OSError, EOFError)
"""Damage behind the header of a CSV file: it is met again, and reported, where the rows are read."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class _Head:
    """What the beginning of a file tells.

    Attributes:
        names: Columns: of the header, or of the first JSON lines.
        sample: First JSON lines.
        is_empty: True if the file has no byte.
    """

    encoding: str
    names: list[str]
    sample: list[Mapping[str, Any]]
    is_empty: bool = False


class LineSource:
    """Line-based files, in order; the beginnings of all are looked at first.

    Raises:
        InputError: a file has no header or another encoding, or columns are missing or ambiguous.
    """

    def __init__(
        self, name: str, format_: SourceFormat, files: FileSet, columns: Columns, reading: Reading
    ) -> None:
        self.name, self.format = name, format_
        self._files = SourceFiles(name, files, reading, what=f"{format_.value} files")
        heads = self._files.looked_at(self._look)
        self.files, self.patience, self.bad_files = self._files.all, self._files.patience, self._files.bad
        self.notes, self.n_files = self._files.notes, len(self._files)
        self._encodings = {number: head.encoding for number, head in heads.items()}
        shown = [file.shown for file in self.files.files]
        if empty := [shown[number] for number, head in heads.items() if head.is_empty]:
            self.notes.append(f"{len(empty)} files are empty and have no rows, such as {empty[0]}")
        if format_ is SourceFormat.JSONL:
            self.columns = self._columns_of_json(columns, heads, shown)
        else:
            names = {shown[number]: head.names for number, head in heads.items()}
            self.columns = chosen_columns(columns, names)
        self.modality = modality_of(self.columns)
        self.id_type = self._id_type(heads)
        if format_ is SourceFormat.JSONL and reading.captions is None and self.columns.text is not None:
            self._require_no_lists(heads, shown, self.columns.text)

    def _columns_of_json(self, asked: Columns, heads: Mapping[int, _Head], shown: Sequence[str]) -> Columns:
        """Choose columns among the keys of all files; each file must have the one to embed."""
        full = {number: head for number, head in heads.items() if head.sample}
        if not full:
            raise InputError(
                f"{shown[0]} has no JSON object in its first {_SAMPLE_LINES} lines. JSON lines hold one "
                "object a line; convert an array with: jq -c '.[]' FILE > FILE.jsonl, and a document over "
                "several lines with: jq -c . FILE > FILE.jsonl"
            )
        union = list(dict.fromkeys(key for head in full.values() for key in head.names))
        try:
            columns = chosen_columns(asked, {shown[next(iter(full))]: union})
        except InputError as error:
            nested = _lists_of_objects(next(iter(full.values())).sample[0])
            if not nested:
                raise
            raise InputError(
                f"{error} The keys {nested} hold lists of objects; to make each object a line: jq -c "
                f"'.{nested[-1]}[]' FILE > FILE.jsonl"
            ) from error
        item = columns.text or columns.image or ""
        for number, head in full.items():
            if not any(has_column(list(record), item) for record in head.sample):
                raise InputError(
                    f"{shown[number]} has no {item!r} in its first {_SAMPLE_LINES} lines; it has "
                    f"{head.names}. Pass files of one kind, or rename the key."
                )
        return columns

    def _id_type(self, heads: Mapping[int, _Head]) -> IdType:
        column, reading = self.columns.id, self._files.reading
        if column is None:
            return IdType.INT64
        if reading.captions is CaptionUse.EACH:
            return IdType.STRING
        if reading.id_type is not None:
            return reading.id_type
        if self.format is not SourceFormat.JSONL:
            return IdType.STRING
        ids = [value_at(record, column) for head in heads.values() for record in head.sample]
        known = [value for value in ids if value is not None]
        is_whole = bool(known) and are_int64(known)
        return IdType.INT64 if is_whole else IdType.STRING

    @staticmethod
    def _require_no_lists(heads: Mapping[int, _Head], shown: Sequence[str], text: str) -> None:
        for number, head in heads.items():
            if any(isinstance(value_at(record, text), list) for record in head.sample):
                raise InputError(
                    f"{shown[number]}: the key {text!r} holds lists. Pass --captions first to embed the "
                    "first of each, or --captions each to make each a row, with ids ID#0, ID#1, …"
                )

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return self._files.identity()

    def n_rows(self, file: int) -> None:
        """Return ``None``: the number is unknown until the lines are read."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield all rows of a file.

        Raises:
            DamagedFileError: the file is cut off, damaged or not in its encoding.
        """
        return self._files.to_proven_end(file, self._read(file))

    def _read(self, file: int) -> Iterator[Rows]:
        columns = self.columns
        opened = self._files[file]
        item = columns.text or columns.image or ""
        captions = self._files.reading.captions
        cells = Cells(columns, self.id_type, opened.filesystem, opened.folder, captions)
        start = 0
        bad = Problem("malformed-row", "")
        if self.format is SourceFormat.TEXT and columns == _LINES_ONLY:
            for texts in self._texts(file):
                rows = cells.rows(start, None, texts, None)
                yield rows
                start = rows.stop
            return
        with self._lines(file) as lines:
            for records in self._pieces(file, lines):
                rows = cells.rows(
                    start,
                    None if columns.id is None else [_get(record, columns.id, None) for record in records],
                    [
                        _get(record, item, record if isinstance(record, Problem) else bad)
                        for record in records
                    ],
                    None if columns.language is None else [_get(r, columns.language, None) for r in records],
                )
                yield rows
                start = rows.stop

    def _pieces(self, file: int, lines: io.TextIOWrapper) -> Iterator[Sequence[Mapping[str, Any] | Problem]]:
        """Yield the records of a file in lists of at most 8,192, of about 16 MB."""
        shown = self._files[file].shown
        partitions = partitions_of(self._files[file].name)
        match self.format:
            case SourceFormat.TEXT:
                for piece in bounded_pieces(_bounded_lines(lines), PIECE_TEXTS, _length):
                    yield [
                        line if isinstance(line, Problem) else {**partitions, "text": line.rstrip("\r\n")}
                        for line in piece
                    ]
            case SourceFormat.CSV:
                rows = rows_of_csv(lines, self._files[file], self._files.reading)
                header = header_of_csv(rows, shown)
                yield from (
                    records_of_csv(header, piece, partitions)
                    for piece in bounded_pieces((row for row in rows if row), PIECE_TEXTS, _size)
                )
            case _:
                for pairs in bounded_pieces(_json_records(lines, self.columns), PIECE_TEXTS, itemgetter(1)):
                    yield [_with(record, partitions) for record, _ in pairs]

    def _texts(self, file: int) -> Iterator[Sequence[str | Problem]]:
        """Yield the lines of a file in lists of at most 8,192, without their ends."""
        chosen = self._encodings[file]
        with self._files.decompressed(file, self.format.value) as opened:
            yield from texts_of_lines(opened, codecs.getincrementaldecoder(chosen)(_errors_of(chosen)))

    @contextlib.contextmanager
    def _lines(self, file: int, encoding: str | None = None) -> Iterator[io.TextIOWrapper]:
        """Open a file as text; invalid UTF-8 becomes surrogates, which the later text check reports."""
        newline = "" if self.format is SourceFormat.CSV else "\n"
        chosen = encoding or self._encodings[file]
        with (
            self._files.decompressed(file, self.format.value) as opened,
            io.TextIOWrapper(opened, chosen, errors=_errors_of(chosen), newline=newline) as lines,
        ):
            try:
                yield lines
            except csv.Error as error:
                raise DamagedFileError(
                    f"{self._files[file].shown} cannot be read as csv ({error}). Check --delimiter, --quote "
                    "and --escape, or restore the file."
                ) from error

    def _look(self, number: int) -> _Head:
        """Look at the beginning of a file: its encoding, and its header or first JSON lines."""
        file = self._files[number]
        with self._files.decompressed(number, self.format.value) as opened:
            start = opened.read(4_096)
        encoding = self._files.reading.encoding or _encoding_of(start, file.shown)
        partitions = partitions_of(file.name)
        if self.format is SourceFormat.TEXT:
            _require_line_feeds(start.decode(encoding, "replace"), file.shown)
            return _Head(encoding, [*partitions, "text"], [], is_empty=not start)
        with self._lines(number, encoding) as lines:
            if self.format is SourceFormat.CSV:
                rows = rows_of_csv(lines, file, self._files.reading)
                header = header_of_csv(rows, file.shown)
                with contextlib.suppress(*_REPORTED_LATER):
                    deque(islice(rows, _SAMPLE_LINES), maxlen=0)
                return _Head(encoding, [*header, *(n for n in partitions if n not in header)], [])
            sample: list[Mapping[str, Any]] = []
            try:
                for line in islice(_bounded_lines(lines), _SAMPLE_LINES):
                    if isinstance(line, Problem):
                        continue
                    record = None if line.isspace() else _json_record(line)
                    if not sample and line.lstrip().startswith("["):
                        raise InputError(
                            f"{file.shown} begins with a JSON array; JSON lines hold one object a line. "
                            "Convert it: jq -c '.[]' FILE > FILE.jsonl"
                        )
                    if isinstance(record, Mapping):
                        sample.append(_with(record, partitions))
            except (OSError, EOFError):
                if not sample or not self._files.reading.skip_bad_files:
                    raise  # otherwise the lines before the damage are read
            return _Head(
                encoding, list(dict.fromkeys(key for record in sample for key in record)), sample, not start
            )


def _encoding_of(start: bytes, where: str) -> str:
    """Return the encoding that the beginning of a file shows.

    Raises:
        InputError: it holds NUL bytes, which text in UTF-8 hardly does.
    """
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    if b"\0" in start:
        raise InputError(
            f"{where} holds NUL bytes and no byte order mark. Pass its encoding, such as --text-encoding "
            "utf-16-le, or utf-8 if the NUL bytes are part of its texts, or its format with --format."
        )
    return "utf-8"


def _require_line_feeds(start: str, where: str) -> None:
    """Check that the beginning of a text does not end its lines with carriage returns alone.

    Raises:
        InputError: it does, and would be one row.
    """
    if "\n" not in start and "\r" in start.rstrip("\r"):
        raise InputError(
            f"{where} has carriage returns and no line feed in its first {len(start):,} characters: "
            "it would be one row. End its lines with line feeds: tr '\\r' '\\n' < FILE > FILE.txt"
        )


def _errors_of(encoding: str) -> str:
    """Return how bytes are taken that are no text: those of UTF-8 are the fault of their row alone."""
    return "surrogateescape" if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") else "strict"


def _bounded_lines(lines: io.TextIOWrapper) -> Iterator[str | Problem]:
    """Yield lines, and in place of one that is too long, the row's problem."""
    while line := lines.readline(MOST_CHARACTERS):
        if len(line) < MOST_CHARACTERS or line.endswith("\n"):
            yield line
            continue
        n_characters = len(line)
        while not line.endswith("\n") and (line := lines.readline(SKIPPED_AT_ONCE)):
            n_characters += len(line)
        yield too_long(n_characters, "line")


def _lists_of_objects(record: Mapping[str, Any]) -> list[str]:
    return [
        key for key, value in record.items()
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    ]  # fmt: skip


def _length(line: str | Problem) -> int:
    return 0 if isinstance(line, Problem) else len(line)


def _size(fields: list[str] | Problem) -> int:
    return 0 if isinstance(fields, Problem) else sum(map(len, fields))


def _json_records(
    lines: io.TextIOWrapper, columns: Columns
) -> Iterator[tuple[Mapping[str, Any] | Problem, int]]:
    """Yield the record of each line that is not blank, and the line's length."""
    used = (columns.id, columns.text, columns.image, columns.language)
    keys = {key for name in used if name is not None for key in (name, *name.split("."))}
    quoted = [json.dumps(key, ensure_ascii=False) for key in sorted(keys)]
    for line in _bounded_lines(lines):
        if isinstance(line, Problem):
            yield line, 0
        elif not line.isspace():
            yield _json_record(line, quoted), len(line)


def _json_record(line: str, quoted: Sequence[str] = ()) -> Mapping[str, Any] | Problem:
    """Return the object of a line, or the row's problem.

    Args:
        quoted: Keys, in quotation marks, that no object of the line may have twice: Python's reader takes the
            last value then, others the first.
    """
    try:
        record = json.loads(line)
        if any(line.count(key) > 1 for key in quoted):
            json.loads(line, object_pairs_hook=partial(_once_each, quoted))
    except _RepeatedKeyError as error:
        return Problem("malformed-row", f"The line has the key {error} twice in one object.")
    except (ValueError, RecursionError) as error:
        if not line.endswith("\n") and line.startswith("{") and not line.endswith("}"):
            raise EOFError("its last line is cut off inside a JSON object") from error
        return Problem("malformed-row", f"The line is not JSON: {error}.")
    if not isinstance(record, dict):
        return Problem("malformed-row", f"The line is a {type(record).__name__}; expected a JSON object.")
    return record


class _RepeatedKeyError(Exception):
    """An object has a key twice; the message is the key in quotation marks."""


def _once_each(quoted: Sequence[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [key for key, _ in pairs]
    for key in quoted:
        if names.count(json.loads(key)) > 1:
            raise _RepeatedKeyError(key)
    return dict(pairs)


def _with(record: Mapping[str, Any] | Problem, partitions: Mapping[str, Any]) -> Any:
    return record if isinstance(record, Problem) or not partitions else {**partitions, **record}


def _get(record: Mapping[str, Any] | Problem, column: str, otherwise: Any) -> Any:
    return otherwise if isinstance(record, Problem) else value_at(record, column)
