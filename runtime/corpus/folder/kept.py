"""Columns of a source that are carried through to the vectors, read again for each part that is written.

The columns take no part in the pipeline: a part's rows are numbers of the source's rows, and its kept columns
are read by these numbers while the next part is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.corpus.sources import Source, SourceFormat
from runtime.corpus.sources.tables import TableSource
from runtime.errors import InputError
from runtime.extras import pyarrow

__all__ = ["KeptColumns"]

_BATCH_ROWS = 8_192
_FAR_ROWS = 1 << 17
"""Rows ahead that are read over; for further ones the file is opened again, at their row group."""

_RESERVED = ("id", "vector")


@dataclass(slots=True)
class KeptColumns:
    """Reader of kept columns; one thread at a time may use it.

    Attributes:
        schema: Arrow schema of the columns, as the first file has them.
    """

    source: TableSource
    names: tuple[str, ...]
    schema: Any
    _file: int = -1
    _row: int = 0
    _batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    _rest: Any = None

    @classmethod
    def of(cls, source: Source, names: Sequence[str]) -> KeptColumns | None:
        """Return a reader of columns, or ``None`` for no names.

        Raises:
            InputError: the source has no columns that can be read by row numbers, or lacks one of the names.
        """
        if not names:
            return None
        if not isinstance(source, TableSource) or any(
            source.n_rows(file) is None for file in range(source.n_files)
        ):
            kinds = ", ".join(kind.value for kind in _FORMATS)
            raise InputError(
                f"Columns are kept of {kinds}, but {source.name} is {source.format.value}. Convert it to "
                "Parquet, or leave --keep out and join by the ids."
            )
        if wrong := [name for name in names if name in _RESERVED]:
            raise InputError(
                f"The column {wrong[0]!r} cannot be kept under this name, which the vectors have. Rename it, "
                "or pass it with --id."
            )
        with source.opened(0) as table:
            found = table.schema
        for name in source.partitions(0, found.names):
            found = found.append(pyarrow().field(name, pyarrow().string()))
        if missing := [name for name in names if name not in found.names]:
            raise InputError(f"{source.name} has no column {missing[0]!r} to keep; it has {found.names}.")
        schema = pyarrow().schema([found.field(name).remove_metadata() for name in names])
        return cls(source, tuple(names), schema)

    def rows(self, start: int, stop: int) -> Any:
        """Return the kept columns of rows ``start <= row < stop``, numbered over all files: an Arrow table.

        Raises:
            InputError: a file lacks a column, or has it in a type that cannot be converted.
        """
        pieces, offset = [], 0
        for file in range(self.source.n_files):
            count = self.source.n_rows(file) or 0
            low, high = max(start, offset) - offset, min(stop, offset + count) - offset
            if low < high:
                pieces += list(self._of_file(file, low, high))
            offset += count
        return pyarrow().Table.from_batches(pieces, schema=self.schema)

    def _of_file(self, file: int, start: int, stop: int) -> Iterator[Any]:
        if file != self._file or not self._row <= start <= self._row + _FAR_ROWS:
            self._file, self._row, self._rest = file, 0, None
            self._batches = self._read(file, start)
        while self._row < stop:
            if self._rest is None or not self._rest.num_rows:
                row, batch = next(self._batches)
                self._row, self._rest = row, batch
            skipped = min(max(0, start - self._row), self._rest.num_rows)
            taken = min(stop - self._row - skipped, self._rest.num_rows - skipped)
            if taken > 0:
                yield self._rest.slice(skipped, taken)
            self._row += skipped + max(0, taken)
            self._rest = self._rest.slice(skipped + max(0, taken))

    def _read(self, file: int, first: int) -> Iterator[tuple[int, Any]]:
        """Yield batches with their first row number, beginning at the row group or batch of a row."""
        with self.source.opened(file) as table:
            fixed = self.source.partitions(file, table.schema.names)
            own = [name for name in self.names if name not in fixed]
            for row, batch in self._own_columns(table, file, own, first):
                try:
                    yield (row, self._record_batch(batch, fixed))
                except (KeyError, pyarrow().ArrowException) as error:
                    raise InputError(
                        f"File {file} of {self.source.name} has other columns than the first one ({error}); "
                        f"{', '.join(self.names)} are kept. Give all files the same columns."
                    ) from error

    def _own_columns(
        self, table: Any, file: int, names: Sequence[str], first: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield batches of columns in the file, or their row numbers if there are no such columns."""
        if names:
            yield from table.batches(names, _BATCH_ROWS, lambda start, stop: stop > first)
            return
        n_rows = self.source.n_rows(file) or 0
        for start in range(first // _BATCH_ROWS * _BATCH_ROWS, n_rows, _BATCH_ROWS):
            yield start, range(start, min(start + _BATCH_ROWS, n_rows))

    def _record_batch(self, batch: Any, fixed: Mapping[str, str | None]) -> Any:
        """Return the kept columns of a batch, with those that are partitions of its file."""
        n_rows = len(batch) if isinstance(batch, range) else batch.num_rows
        columns = [
            pyarrow().array([fixed[field.name]] * n_rows, pyarrow().string()).cast(field.type)
            if field.name in fixed
            else batch.column(field.name).cast(field.type)
            for field in self.schema
        ]
        return pyarrow().record_batch(columns, schema=self.schema)


_FORMATS = (SourceFormat.PARQUET, SourceFormat.ARROW, SourceFormat.DATASETS)
