"""Parquet files, read row group by row group; columns with pages too large to hold are read in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

from runtime.corpus.rows import Needs
from runtime.corpus.sources.base import PIECE_BYTES
from runtime.corpus.sources.column_types import is_string
from runtime.corpus.sources.opened import SourceFiles
from runtime.corpus.sources.parquet_pages import ColumnChunk, has_page_larger_than, values_of_chunk
from runtime.errors import InputError

__all__ = ["ParquetTable"]


_LARGE_CELLS_BYTES = 4 << 20
"""Cells of large pages that are read at once: they are held as bytes, in Arrow and as Python's strings."""

_Cells: TypeAlias = "Iterator[bytes | None]"


class ParquetTable:
    """Open Parquet file.

    Attributes:
        schema: Arrow schema.
    """

    def __init__(self, files: SourceFiles, number: int) -> None:
        import pyarrow
        import pyarrow.parquet

        self._raw = files.raw(number)
        # larger buffers would be kept per column for each of thousands of row groups
        try:
            self._file = pyarrow.parquet.ParquetFile(
                pyarrow.PythonFile(files.raw(number), mode="r"),
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        except (pyarrow.ArrowException, OSError) as error:
            if "encrypted" in str(error):
                raise InputError(f"{files[number].shown} is encrypted. Pass a decrypted copy.") from error
            raise
        self.schema = self._file.schema_arrow

    def require_end(self) -> None:
        """Nothing is left to check: a file without its footer is not opened."""

    def n_rows_of_footer(self) -> int | None:
        """Return the number of rows."""
        return self.n_rows()

    def n_rows(self) -> int:
        """Return the number of rows, from the footer."""
        return int(self._file.metadata.num_rows)

    def batches(
        self, columns: Sequence[str], size: int, needs: Needs, *, most_bytes: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield record batches of at most ``size`` rows and about 16 MB, each with its first row number.

        Args:
            most_bytes: Length above which cells of large pages may be cut.

        Raises:
            EOFError, OSError, pyarrow.ArrowException: a page is damaged.
        """
        row = 0
        for group in range(self._file.num_row_groups):
            metadata = self._file.metadata.row_group(group)
            n_rows = metadata.num_rows
            if needs(row, row + n_rows):
                at = row
                for batch in self._batches_of_group(group, columns, size, most_bytes):
                    yield at, batch
                    at += batch.num_rows
                if at != row + n_rows:
                    raise EOFError(f"row group {group} holds {at - row:,} of {n_rows:,} rows")
            row += n_rows

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)
        self._raw.close()

    def _batches_of_group(
        self, group: int, columns: Sequence[str], size: int, most_bytes: int | None
    ) -> Iterator[Any]:
        large = self._large_columns(group, columns)
        if not large:
            yield from self._small_batches(group, columns, size)
            return
        rest = [column for column in columns if _top(column, self.schema) not in large]
        small = self._small_batches(group, rest, size) if rest else iter(())
        with contextlib.ExitStack() as stack:
            readers = {
                name: {
                    leaf: stack.enter_context(
                        contextlib.closing(values_of_chunk(self._raw, chunk, most_bytes))
                    )
                    for leaf, chunk in leaves.items()
                }
                for name, leaves in large.items()
            }
            yield from self._joined_batches(small if rest else None, readers, size)

    def _joined_batches(
        self,
        small: Iterator[Any] | None,
        large: Mapping[str, Mapping[str, Iterator[bytes | None]]],
        size: int,
    ) -> Iterator[Any]:
        """Yield batches of small columns, if there are any, beside as many rows of the large ones."""
        import pyarrow

        rows = zip(*(reader for leaves in large.values() for reader in leaves.values()), strict=True)
        held: Any = None
        while piece := _bounded(rows, size):
            cells = iter(zip(*piece, strict=True))
            arrays = {
                name: _array(self.schema.field(name), dict(zip(leaves, cells, strict=False)))
                for name, leaves in large.items()
            }
            if small is not None:
                while held is None or held.num_rows < len(piece):
                    more = next(small, None)
                    if more is None:
                        raise EOFError("the columns of a row group have different numbers of rows")
                    found = pyarrow.Table.from_batches([more])
                    held = found if held is None else pyarrow.concat_tables([held, found])
                taken = held.slice(0, len(piece)).combine_chunks()
                held = held.slice(len(piece))
                arrays |= {name: taken.column(name).chunk(0) for name in taken.schema.names}
            yield pyarrow.RecordBatch.from_arrays(list(arrays.values()), list(arrays))

    def _small_batches(self, group: int, columns: Sequence[str], size: int) -> Iterator[Any]:
        most = _bounded_size(size, self._file.metadata.row_group(group), columns)
        batches: Iterator[Any] = self._file.iter_batches(
            most, row_groups=[group], columns=list(columns), use_threads=False
        )
        return batches

    def _large_columns(self, group: int, columns: Sequence[str]) -> dict[str, dict[str, ColumnChunk]]:
        """Return the columns that have a large page and can be read in pieces: name → leaf → its place."""
        metadata, schema = self._file.metadata.row_group(group), self._file.schema
        found: dict[str, dict[str, ColumnChunk]] = {}
        for name in dict.fromkeys(_top(column, self.schema) for column in columns):
            asked = [column for column in columns if _top(column, self.schema) == name]
            leaves = {
                path: i
                for i in range(metadata.num_columns)
                if (path := schema.column(i).path) in asked or (name in asked and path.startswith(f"{name}."))
            }
            chunks = {path: ColumnChunk.of(metadata, schema, i) for path, i in leaves.items()}
            known = {path: chunk for path, chunk in chunks.items() if chunk is not None}
            if len(known) < len(chunks) or not _is_of_strings(self.schema.field(name).type, known, name):
                continue
            if any(
                metadata.column(leaves[path]).total_uncompressed_size > PIECE_BYTES
                and has_page_larger_than(self._raw, chunk, PIECE_BYTES)
                for path, chunk in known.items()
            ):
                found[name] = {path.removeprefix(name).removeprefix("."): c for path, c in known.items()}
        return found


def _top(column: str, schema: Any) -> str:
    """Return the top column of a name, which may lead into a struct with dots."""
    return column if column in schema.names else column.split(".")[0]


def _is_of_strings(kind: Any, leaves: Mapping[str, ColumnChunk], name: str) -> bool:
    """Return whether leaves are a column of strings or bytes, or such fields of a struct of one level."""
    import pyarrow

    if not leaves:
        return False
    if not pyarrow.types.is_struct(kind):
        return set(leaves) == {name} and is_string(kind)
    fields = {f"{name}.{kind.field(i).name}": kind.field(i).type for i in range(kind.num_fields)}
    return all(path in fields and is_string(fields[path]) for path in leaves)


def _bounded(rows: Iterator[tuple[bytes | None, ...]], size: int) -> list[tuple[bytes | None, ...]]:
    """Return the next rows: at most ``size``, and no further ones after 4 MB."""
    piece, n_bytes = [], 0
    for row in islice(rows, size):
        piece.append(row)
        n_bytes += sum(len(cell) for cell in row if cell is not None)
        if n_bytes >= _LARGE_CELLS_BYTES:
            break
    return piece


def _array(field: Any, leaves: Mapping[str, Sequence[bytes | None]]) -> Any:
    """Return a column of strings or bytes, or a struct of them where the leaves have names."""
    import pyarrow

    if "" in leaves:
        return _strings(field.type, leaves[""])
    kinds = {field.type.field(i).name: field.type.field(i) for i in range(field.type.num_fields)}
    return pyarrow.StructArray.from_arrays(
        [_strings(kinds[name].type, values) for name, values in leaves.items()],
        fields=[kinds[name] for name in leaves],
    )


def _strings(kind: Any, values: Sequence[bytes | None]) -> Any:
    import pyarrow

    is_large = pyarrow.types.is_large_string(kind) or pyarrow.types.is_large_binary(kind)
    return pyarrow.array(values, pyarrow.large_binary() if is_large else pyarrow.binary()).view(kind)


def _bounded_size(size: int, metadata: Any, columns: Sequence[str]) -> int:
    """Return the rows of a batch so that its cells take about 16 MB, by the sizes in the footer."""
    tops = {column.split(".")[0] for column in columns}
    n_bytes = 0
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema.split(".")[0] in tops:
            n_bytes += column.total_uncompressed_size
    mean = n_bytes / max(1, metadata.num_rows)
    return max(1, min(size, int(PIECE_BYTES / max(1.0, mean))))
