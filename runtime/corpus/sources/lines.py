"""CSV, JSON lines and plain text, read line by line; an unparsable line is a bad row."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from runtime.corpus.files import FileSet, digest_of_files
from runtime.corpus.rows import Columns, IdType, Needs, Problem, Rows
from runtime.corpus.sources.base import PIECE_TEXTS, SourceFormat, chosen_columns
from runtime.corpus.sources.records import Cells, modality_of
from runtime.errors import InputError
from runtime.preprocessing.batching import windows

__all__ = ["LineSource"]

_SAMPLE_LINES = 64
"""JSON lines that are sampled for column names."""


class LineSource:
    """Line-based files, in order; each CSV file has its own header.

    Raises:
        InputError: a file has no header, or columns are missing or ambiguous.
    """

    def __init__(self, name: str, format_: SourceFormat, files: FileSet, columns: Columns) -> None:
        if not files.files:
            raise InputError(f"{name} holds no {format_.value} files.")
        self.name, self.format = name, format_
        self._files = files
        self.n_files = len(files.files)
        self._delimiter = "\t" if files.files[0].suffix == ".tsv" else ","
        where = files.files[0].path
        self.id_type = IdType.STRING
        match format_:
            case SourceFormat.TEXT:
                self.columns = chosen_columns(columns, ["text"], where=where)
            case SourceFormat.CSV:
                with self._lines(0) as lines:
                    header = _header(self._csv_rows(lines, where), where)
                    self.columns = chosen_columns(columns, header, where=where)
            case _:
                sample = self._sample(where)
                names = list(dict.fromkeys(key for record in sample for key in record))
                self.columns = chosen_columns(columns, names, where=where)
                ids = [record.get(self.columns.id or "") for record in sample if self.columns.id in record]
                if ids and all(isinstance(value, int) for value in ids):
                    self.id_type = IdType.INT64
        if self.columns.id is None:
            self.id_type = IdType.INT64
        self.modality = modality_of(self.columns)

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return digest_of_files(self._files.files, map(self._files.relative, self._files.files))

    def n_rows(self, file: int) -> None:
        """Return ``None``: the number is unknown until the lines are read."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield all rows of a file."""
        path = self._files.files[file].path
        columns = self.columns
        item = columns.text if columns.text is not None else columns.image
        cells = Cells(columns, self.id_type, self._files.filesystem, path.rsplit("/", 1)[0])
        start = 0
        for records in windows(self._records(file), PIECE_TEXTS):
            bad = Problem("malformed-row", "")
            yield cells.rows(
                start,
                None if columns.id is None else [_get(record, columns.id, None) for record in records],
                [_get(record, item, record if isinstance(record, Problem) else bad) for record in records],
                None if columns.language is None else [_get(r, columns.language, None) for r in records],
            )
            start += len(records)

    def _records(self, file: int) -> Iterator[Mapping[str, Any] | Problem]:
        with self._lines(file) as lines:
            match self.format:
                case SourceFormat.TEXT:
                    yield from ({"text": line.rstrip("\r\n")} for line in lines)
                case SourceFormat.CSV:
                    where = self._files.files[file].path
                    rows = self._csv_rows(lines, where)
                    yield from _csv_records(_header(rows, where), rows)
                case _:
                    yield from (_json_record(line) for line in lines if not line.isspace())

    @contextlib.contextmanager
    def _lines(self, file: int) -> Iterator[io.TextIOWrapper]:
        """Open a file as text; invalid UTF-8 becomes surrogates, which the later text check reports."""
        path = self._files.files[file].path
        newline = "" if self.format is SourceFormat.CSV else "\n"
        try:
            opened = self._files.filesystem.open_input_stream(path, compression="detect", buffer_size=1 << 20)
            with io.TextIOWrapper(
                opened, encoding="utf-8-sig", errors="surrogateescape", newline=newline
            ) as lines:
                yield lines
        except (OSError, csv.Error) as error:
            raise InputError(
                f"{path} cannot be read as {self.format.value} ({error}). "
                "Restore it if it is truncated or damaged."
            ) from error

    def _csv_rows(self, lines: io.TextIOWrapper, where: str) -> Iterator[list[str]]:
        """Yield the fields of each row, and check that the file does not end inside a quoted field.

        ``csv`` takes an end inside quotes for the end of the field. So one more line is read, a lone
        delimiter: two empty fields on their own, but a part of a field that is still open.
        """
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = csv.reader(chain(lines, [self._delimiter]), delimiter=self._delimiter, strict=False)
        previous: list[str] | None = None
        first_line, last_line = 1, 0
        for fields in reader:
            if previous is not None:
                yield previous
                first_line = last_line + 1
            previous, last_line = fields, reader.line_num
        if previous != ["", ""] or last_line != first_line:
            raise InputError(
                f"{where}, line {first_line}: a quoted field begins in this row and does not end, so "
                "the file is cut off or a quotation mark is missing. Restore the file, or close the field."
            )

    def _sample(self, where: str) -> list[Mapping[str, Any]]:
        records = list(islice(self._records(0), _SAMPLE_LINES))
        found = [record for record in records if not isinstance(record, Problem)]
        if not found:
            raise InputError(f"{where} has no JSON object in its first {_SAMPLE_LINES} lines.")
        return found


def _header(rows: Iterator[list[str]], where: str) -> list[str]:
    header = next(rows, None)
    if not header:
        raise InputError(f"{where} is empty; a CSV file must start with its column names.")
    return header


def _csv_records(header: list[str], rows: Iterator[list[str]]) -> Iterator[Mapping[str, Any] | Problem]:
    for fields in rows:
        if not fields:
            continue  # an empty line is not a record, as in other CSV readers
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        else:
            yield Problem(
                "malformed-row", f"The line has {len(fields)} fields; the header has {len(header)}."
            )


def _json_record(line: str) -> Mapping[str, Any] | Problem:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Problem("malformed-row", f"The line is not JSON: {error}.")
    if not isinstance(record, dict):
        return Problem("malformed-row", f"The line is a {type(record).__name__}; expected a JSON object.")
    return record


def _get(record: Mapping[str, Any] | Problem, column: str | None, otherwise: Any) -> Any:
    return otherwise if isinstance(record, Problem) else record.get(column or "")
