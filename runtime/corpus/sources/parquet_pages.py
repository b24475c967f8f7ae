"""Pages of a Parquet column of byte strings, read in pieces.

The libraries that read Parquet decompress a page as a whole, and writers close a page after 1,024 values
however long these are: a page of texts of 200 kB takes 200 MB, its dictionary twice as much. Here pages are
decompressed in pieces, and a dictionary lies in a temporary file.

Source:
    Apache Parquet's format, ``Encodings.md``.
"""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.sources.parquet_headers import Page, PageKind, numbers_from_hybrid, page_at
from runtime.corpus.sources.snappy import FarReferenceError, pieces_of_snappy
from runtime.errors import OutputFaultError

__all__ = ["ColumnChunk", "has_page_larger_than", "values_of_chunk"]

_PIECE_BYTES = 1 << 20
_PAGES_LOOKED_AT = 256
_STREAMED = {"GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_WHOLE = {"LZ4": "lz4_raw", "LZ4_RAW": "lz4_raw"}
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """Place of a column of one row group in a file, by its footer.

    Attributes:
        start: Offset of the first page, in bytes.
        n_bytes: Size of all pages with their headers.
        codec: Name of the compression, as the footer has it.
        max_level: Definition level of a value that is there; a lower one is a null.
    """

    start: int
    n_bytes: int
    n_values: int
    codec: str
    max_level: int

    @classmethod
    def of(cls, metadata: Any, schema: Any, column: int) -> ColumnChunk | None:
        """Return the place of a column, or ``None`` if ``values_of_chunk`` cannot read it.

        Args:
            metadata: ``pyarrow.parquet.RowGroupMetaData``.
            schema: ``pyarrow.parquet.ParquetSchema``.
            column: Number of the column among the leaves of the schema.
        """
        found, kind = metadata.column(column), schema.column(column)
        known = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}
        if (
            found.physical_type != "BYTE_ARRAY"
            or kind.max_repetition_level
            or not known.issuperset(found.encodings)
            or found.compression not in {"UNCOMPRESSED", "SNAPPY", *_STREAMED, *_WHOLE}
        ):
            return None
        start = found.data_page_offset
        if found.has_dictionary_page and found.dictionary_page_offset:
            start = min(start, found.dictionary_page_offset)
        return cls(
            start, found.total_compressed_size, found.num_values, found.compression, kind.max_definition_level
        )


def has_page_larger_than(file: Any, chunk: ColumnChunk, n_bytes: int) -> bool:
    """Return whether one of a chunk's first 256 pages is larger than ``n_bytes`` when decompressed."""
    at, stop = chunk.start, chunk.start + chunk.n_bytes
    for _ in range(_PAGES_LOOKED_AT):
        if at >= stop:
            return False
        page, size = page_at(file, at, stop)
        if page.n_unpacked > n_bytes:
            return True
        at += size + page.n_packed
    return False


def values_of_chunk(
    file: Any, chunk: ColumnChunk, most_bytes: int | None = None
) -> Generator[bytes | None, None, None]:
    """Yield the values of a chunk in order, ``None`` for nulls.

    Args:
        file: Binary file that can seek.
        most_bytes: Longer values are cut to this length.

    Raises:
        OutputFaultError: there is no room for temporary files.
        EOFError: the chunk is cut off, holds other numbers of values than it says, or has a wrong checksum.
        pyarrow.ArrowException, OSError: a page is damaged.
    """
    at, stop, n_values = chunk.start, chunk.start + chunk.n_bytes, 0
    dictionary = _Dictionary()
    with dictionary.file:
        while at < stop and n_values < chunk.n_values:
            page, size = page_at(file, at, stop)
            _Stored(file, at + size, page).require_checksum()
            stored = _Stored(file, at + size, page)
            unpacked = _Unpacked(stored.pieces(chunk.codec), most_bytes)
            if page.kind == PageKind.DICTIONARY:
                dictionary.fill(unpacked, page.n_values)
            elif page.kind in (PageKind.DATA, PageKind.DATA_V2):
                yield from _values_of_page(page, stored, unpacked, chunk.max_level, dictionary)
                n_values += page.n_values
            at += size + page.n_packed
    if n_values != chunk.n_values:
        raise EOFError(f"a column chunk holds {n_values:,} of {chunk.n_values:,} values")


def _values_of_page(
    page: Page, stored: _Stored, unpacked: _Unpacked, max_level: int, dictionary: _Dictionary
) -> Iterator[bytes | None]:
    n_values = page.n_values
    if page.kind == PageKind.DATA_V2:
        encoding, levels = page.fields[4], stored.levels[page.fields[6] :]
    else:
        encoding = page.fields[2]
        levels = b""
        if max_level:
            if page.fields[3] != _RLE:
                raise EOFError(f"definition levels have the encoding {page.fields[3]}; expected {_RLE}")
            levels = unpacked.read(int.from_bytes(unpacked.read(4), "little"))
    is_there = np.ones(n_values, dtype=np.bool_)
    if max_level:
        is_there = numbers_from_hybrid(levels, max_level.bit_length(), n_values) == max_level
    n_there = int(is_there.sum())
    if encoding == _PLAIN:
        for there in is_there.tolist():
            yield unpacked.value() if there else None
    elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        packed = unpacked.rest()
        if n_there and not packed:
            raise EOFError("a page lacks its numbers")
        numbers = iter(numbers_from_hybrid(packed[1:], packed[0], n_there).tolist() if n_there else [])
        for there in is_there.tolist():
            yield dictionary.value(next(numbers)) if there else None
    else:
        raise EOFError(f"a page has the encoding {encoding}, which the footer does not name")
    unpacked.rest()


class _Stored:
    """Bytes of a page as they lie in the file."""

    def __init__(self, file: Any, start: int, page: Page) -> None:
        self._file, self._at, self._page = file, start, page
        self._left = page.n_packed
        self.levels = self.read(page.levels_bytes) if page.levels_bytes else b""

    def read(self, n_bytes: int) -> bytes:
        n_bytes = min(n_bytes, self._left)
        if not n_bytes:
            return b""
        self._file.seek(self._at)
        data = bytes(self._file.read(n_bytes))
        if len(data) != n_bytes:
            raise EOFError("a page is cut off")
        self._at += n_bytes
        self._left -= n_bytes
        return data

    def pieces(self, codec: str) -> Iterator[bytes]:
        """Yield the decompressed bytes of the page, after the levels of version 2."""
        n_unpacked = self._page.n_unpacked - self._page.levels_bytes
        if not self._page.is_packed or codec == "UNCOMPRESSED" or not n_unpacked:
            while data := self.read(_PIECE_BYTES):
                yield data
        elif codec == "SNAPPY":
            yield from self._pieces_of_snappy(n_unpacked)
        elif codec in _STREAMED:
            yield from self._pieces_of_stream(_STREAMED[codec])
        else:
            yield _decompressed(_WHOLE[codec], self.read(self._left), n_unpacked)

    def _pieces_of_snappy(self, n_unpacked: int) -> Iterator[bytes]:
        start, left = self._at, self._left
        n_given = 0
        try:
            for piece in pieces_of_snappy(self.read):
                n_given += len(piece)
                yield piece
        except FarReferenceError:
            self._at, self._left = start, left
            yield _decompressed("snappy", self.read(left), n_unpacked)[n_given:]

    def _pieces_of_stream(self, codec: str) -> Iterator[bytes]:
        import pyarrow

        raw = pyarrow.PythonFile(_Reader(self.read), mode="r")
        with pyarrow.CompressedInputStream(raw, codec) as stream:
            while data := stream.read(_PIECE_BYTES):
                yield data

    def require_checksum(self) -> None:
        """Read the page once to compare its checksum, if it has one, before any of its values is used."""
        if self._page.crc is None:
            return
        found = zlib.crc32(self.levels)
        while data := self.read(_PIECE_BYTES):
            found = zlib.crc32(data, found)
        if self._page.crc & 0xFFFFFFFF != found:
            raise EOFError("a page has another checksum than its header says: it is damaged")


class _Reader(io.RawIOBase):
    """File object of a function that reads."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        return self._read(_PIECE_BYTES if size is None or size < 0 else size)


class _Unpacked:
    """Decompressed bytes of a page, read in order."""

    def __init__(self, pieces: Iterator[bytes], most_bytes: int | None) -> None:
        self._pieces, self._most_bytes = pieces, most_bytes
        self._data, self._at = b"", 0

    def value(self) -> bytes:
        """Read a value behind its length, and cut it to the most bytes."""
        n_bytes = int.from_bytes(self.read(4), "little")
        most = n_bytes if self._most_bytes is None else min(n_bytes, self._most_bytes)
        found = self.read(most)
        for at in range(most, n_bytes, _PIECE_BYTES):
            self.read(min(_PIECE_BYTES, n_bytes - at))
        return found

    def read(self, n_bytes: int) -> bytes:
        stop = self._at + n_bytes
        if stop <= len(self._data):
            found, self._at = self._data[self._at : stop], stop
            return found
        parts = [self._data[self._at :]]
        missing = n_bytes - len(parts[0])
        while missing > 0:
            piece = next(self._pieces, None)
            if piece is None:
                raise EOFError("a page ends inside a value")
            parts.append(piece[:missing])
            self._data, self._at = piece, len(parts[-1])
            missing -= len(parts[-1])
        return b"".join(parts)

    def rest(self) -> bytes:
        found = b"".join([self._data[self._at :], *self._pieces])
        self._data, self._at = b"", 0
        return found


class _Dictionary:
    """Values that pages refer to by number, in a temporary file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by its user
        self._stops: NDArray[np.int64] = np.zeros(1, dtype=np.int64)

    def fill(self, unpacked: _Unpacked, n_values: int) -> None:
        """Read the values of a dictionary's page.

        Raises:
            OutputFaultError: they cannot be written.
        """
        self.file.seek(0)
        stops = np.zeros(n_values + 1, dtype=np.int64)
        for i in range(n_values):
            value = unpacked.value()
            stops[i + 1] = stops[i] + len(value)
            try:
                self.file.write(value)
            except OSError as error:
                raise OutputFaultError(
                    f"Temporary files in {tempfile.gettempdir()} cannot be written ({error.strerror}); a "
                    "large dictionary of Parquet is kept there. Free space, or name another folder in TMPDIR."
                ) from error
        self._stops = stops

    def value(self, number: int) -> bytes:
        """Return a value by its number."""
        if not 0 <= number < len(self._stops) - 1:
            raise EOFError(f"a page refers to value {number} of a dictionary of {len(self._stops) - 1}")
        start, stop = int(self._stops[number]), int(self._stops[number + 1])
        self.file.seek(start)
        return self.file.read(stop - start)


def _decompressed(codec: str, data: bytes, n_unpacked: int) -> bytes:
    import pyarrow

    found: bytes = pyarrow.Codec(codec).decompress(data, n_unpacked, asbytes=True)
    return found
