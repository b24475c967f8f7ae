"""Rows of CSV files: fields, quotation marks, escapes and lines that are too long."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from runtime.corpus.files import File
from runtime.corpus.rows import Problem
from runtime.corpus.sources.base import Reading
from runtime.corpus.sources.cells import MOST_CHARACTERS, SKIPPED_AT_ONCE, too_long
from runtime.corpus.sources.opened import SKIP_REMEDY
from runtime.errors import DamagedFileError, InputError

__all__ = ["header_of_csv", "records_of_csv", "rows_of_csv"]

_SEPARATOR_LINE = re.compile(r"sep=(.?)", re.IGNORECASE)


def rows_of_csv(lines: io.TextIOWrapper, file: File, reading: Reading) -> Iterator[list[str] | Problem]:
    """Yield the fields of each row, and check that the file does not end inside a quoted field.

    Of a row with a line too long, only the delimiters and quotation marks are kept, to find its end.

    ``csv`` takes an end inside quotes for the end of the field. So one more line is read, a lone delimiter:
    two empty fields on their own, but a part of a field that is still open.

    Raises:
        DamagedFileError: the file ends inside a quoted field, or in a last row of too few fields.
        InputError: a backslash before a quotation mark may be an escape or a part of the text.
    """
    delimiter = reading.delimiter or ("\t" if file.suffix in (".tsv", ".tab") else ",")
    quote = None if reading.quote == "none" else reading.quote or '"'
    csv.field_size_limit(MOST_CHARACTERS)
    options: dict[str, Any] = {"delimiter": delimiter, "strict": False}
    if quote is None:
        options["quoting"] = csv.QUOTE_NONE
    else:
        options["quotechar"] = quote
    escape = None if reading.escape == "none" else reading.escape
    if escape is not None:
        options["escapechar"] = escape
    kept = f"\r\n{delimiter}{quote or ''}{escape or ''}"
    long_lines = _Lines(lines, re.compile(f"[^{re.escape(kept)}]+"))
    if reading.escape is None and quote is not None:
        long_lines.marker = f"\\{quote}"
    escaped: Iterator[str] = iter(long_lines)
    if escape is not None:
        escaped = _only_escapes(escaped, escape, f"\r\n{delimiter}" if quote is None else quote)
    reader = csv.reader(chain(escaped, [delimiter]), **options)
    previous: list[str] | None = None
    n_fields, first_line, last_line = 0, 1, 0
    for fields in reader:
        if previous is not None:
            n_fields = n_fields or len(previous)
            if long_lines.ends_open and 0 < len(previous) < n_fields:
                raise DamagedFileError(
                    f"{file.shown}, line {first_line}: the last row has {len(previous)} of {n_fields} fields "
                    "and no end of line, so the file is cut off. Restore it, or end the line."
                )
            yield long_lines.problem(first_line, last_line) or previous
            first_line = last_line + 1
        if long_lines.is_marked and not long_lines.problem(first_line, reader.line_num):
            _require_clear(long_lines.row, file.shown, first_line, delimiter, quote or "")
        long_lines.end_row()
        previous, last_line = fields, reader.line_num
    if previous != ["", ""] or last_line != first_line:
        raise DamagedFileError(
            f"{file.shown}, line {first_line}: a quoted field begins in this row and does not end, so the "
            "file is cut off or a quotation mark is missing. Restore the file, close the field, or pass "
            "--quote none if its quotation marks are part of the texts."
        )


def header_of_csv(rows: Iterator[list[str] | Problem], where: str) -> list[str]:
    """Return the column names.

    Raises:
        DamagedFileError: the file is empty.
        InputError: its first line holds no names.
    """
    header = next((row for row in rows if row), None)
    if isinstance(header, Problem):
        raise InputError(f"{where} has no header: {header.reason}")
    if not header:
        raise DamagedFileError(
            f"{where} is empty; a CSV file must start with its column names. Restore it, or remove it"
            f"{SKIP_REMEDY}"
        )
    if (found := _SEPARATOR_LINE.fullmatch(header[0])) and not any(header[1:]):
        remedy = f" and pass --delimiter '{found[1]}'" if found[1] else ""
        raise InputError(
            f"{where} begins with {header[0]!r}, which is Excel's and no header. Remove this line{remedy}: "
            "tail -n +2 FILE > NEW."
        )
    return header


def records_of_csv(
    header: list[str], rows: Sequence[list[str] | Problem], partitions: Mapping[str, Any]
) -> list[Mapping[str, Any] | Problem]:
    """Return rows as mappings; one with another number of fields is malformed."""
    n = len(header)
    return [
        fields if isinstance(fields, Problem)
        else {**partitions, **dict(zip(header, fields, strict=True))} if len(fields) == n
        else Problem("malformed-row", f"The line has {len(fields)} fields; the header has {n}.")
        for fields in rows
    ]  # fmt: skip


class _Lines:
    """Lines of a CSV file; of those that are too long, only what a pattern leaves.

    Attributes:
        marker: Text that marks a row to be looked at; the lines of each row are then kept.
        is_marked: True if a line of the current row holds it.
        row: Lines of the current row.
        ends_open: True at the end of a file whose last line has no end.
    """

    marker: str | None = None

    def __init__(self, lines: io.TextIOWrapper, left_out: re.Pattern[str]) -> None:
        self._lines, self._left_out = lines, left_out
        self._problems: dict[int, Problem] = {}
        self.is_marked = False
        self.row: list[str] = []
        self.ends_open = False

    def __iter__(self) -> Iterator[str]:
        number, last = 0, "\n"
        marker, row = self.marker, self.row
        while line := self._lines.readline(MOST_CHARACTERS):
            number, last = number + 1, line
            if len(line) < MOST_CHARACTERS or line.endswith(("\n", "\r")):
                if marker is not None:
                    row.append(line)
                    if marker in line:
                        self.is_marked = True
                yield line
                continue
            n_characters, rest = len(line), [self._left_out.sub("", line)]
            while not line.endswith(("\n", "\r")) and (line := self._lines.readline(SKIPPED_AT_ONCE)):
                n_characters += len(line)
                rest.append(self._left_out.sub("", line))
            self._problems[number] = too_long(n_characters, "line")
            yield "".join(rest)
        self.ends_open = not last.endswith(("\n", "\r"))

    def end_row(self) -> None:
        """Forget the lines of the row."""
        self.row.clear()
        self.is_marked = False

    def problem(self, first: int, last: int) -> Problem | None:
        """Return the problem of a row that takes the lines from ``first`` to ``last``, counted from 1."""
        if not self._problems:
            return None
        return next((p for number, p in self._problems.items() if first <= number <= last), None)


def _only_escapes(lines: Iterator[str], escape: str, escapable: str) -> Iterator[str]:
    """Double escape characters that escape nothing: they are text, which ``csv`` would drop."""
    pattern = re.compile(f"{re.escape(escape)}([{re.escape(escape + escapable)}]?)")
    for line in lines:
        yield (
            pattern.sub(lambda match: match[0] if match[1] else 2 * escape, line) if escape in line else line
        )


def _require_clear(row: Sequence[str], where: str, line: int, delimiter: str, quote: str) -> None:
    """Check that every backslash before a quotation mark is part of the text beyond doubt.

    Raises:
        InputError: one may be an escape.
    """
    if _may_be_escaped("".join(row), delimiter, quote):
        raise InputError(
            f"{where}, row from line {line}: a backslash stands before a quotation mark in a quoted field; "
            "it may escape it or be text. Pass --escape '\\' if backslashes escape quotation marks, or "
            "--escape none if they are part of the texts."
        )


def _may_be_escaped(text: str, delimiter: str, quote: str) -> bool:
    r"""Check whether a quoted field of a row reads otherwise if backslashes escape.

    Up to the first such place, both readings agree. A doubled mark inside a field (``\""`` of JSON in CSV) is
    no doubt: the other reading would close the field in the middle of its text.
    """
    at, end = 0, len(text)
    ends = (delimiter, "\r", "\n")
    while at < end:
        if text[at] == quote:
            at += 1
            while at < end:
                start = text.find(quote, at)
                if start < 0:
                    return False
                at = start
                while at < end and text[at] == quote:
                    at += 1
                n_marks = at - start
                n_backslashes = 0
                while text[start - 1 - n_backslashes] == "\\":
                    n_backslashes += 1
                is_at_end = at == end or text[at] in ends
                if n_backslashes % 2 and (n_marks == 1 or (n_marks == 2 and is_at_end)):
                    return True
                if n_marks % 2:
                    break
        at = text.find(delimiter, at)
        if at < 0:
            return False
        at += 1
    return False
