"""Decompression of Snappy blocks in pieces, for pages too large to be held as a whole.

A block has no marks to cut it at, so its elements are walked: every run of whole elements, behind a literal
of the 64 KiB that it may refer to, is a block of its own that the library decompresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runtime.corpus.sources.parquet_headers import varint

__all__ = ["FarReferenceError", "pieces_of_snappy"]

_WINDOW = 1 << 16
"""Bytes that copies with 16-bit offsets reach back; the compressors in use write no others."""

_READ_BYTES = 1 << 18
_LITERAL, _FAR_COPY = 0, 3
_LONG_LITERAL = 60 << 2
"""From this tag on, a literal's length follows in 1 to 4 bytes."""


class FarReferenceError(Exception):
    """A copy refers to more than 64 KiB before it, as no compressor in use writes."""


def _sizes(tag: int) -> tuple[int, int]:
    """Return the bytes that an element takes and gives; 0 for those that the tag alone does not tell."""
    kind, high = tag & 3, tag >> 2
    if kind == _LITERAL:
        return (0, 0) if tag >= _LONG_LITERAL else (high + 2, high + 1)
    return ((2, 4 + (high & 7)), (3, high + 1), (0, 0))[kind - 1]


_TAKEN, _GIVEN = zip(*map(_sizes, range(256)), strict=True)


def pieces_of_snappy(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield what a block decompresses to, in pieces of some megabytes at most.

    Args:
        read: Returns the next bytes of the block, none at its end.

    Raises:
        FarReferenceError: the block must be decompressed as a whole.
        EOFError: it is cut off.
        pyarrow.ArrowException, OSError: it is damaged.
    """
    import pyarrow

    codec = pyarrow.Codec("snappy")
    data, window, n_given = read(_READ_BYTES), b"", 0
    try:
        n_expected, at = varint(data, 0)
    except IndexError:
        raise EOFError("a compressed page has no length") from None
    while n_given < n_expected:
        stop, n_piece = _whole_elements(data, at, n_before=len(window))
        if stop == at:
            more = read(max(_READ_BYTES, len(data) - at))  # a literal longer than what was read
            if not more:
                raise EOFError(f"a compressed page ends after {n_given:,} of {n_expected:,} bytes")
            data, at = data[at:] + more, 0
            continue
        n_before = len(window)
        before = b"" if not n_before else _literal_head(n_before) + window
        block = _written_varint(n_before + n_piece) + before + data[at:stop]
        found: Any = codec.decompress(block, n_before + n_piece, asbytes=True)
        window = found[-_WINDOW:]
        n_given += n_piece
        yield found[n_before:]
        data, at = data[stop:] + read(_READ_BYTES), 0


def _whole_elements(data: bytes, at: int, *, n_before: int) -> tuple[int, int]:
    """Return the end of the last element that is there as a whole, and the bytes that all of them give."""
    end, given = len(data), 0
    taken_by, given_by = _TAKEN, _GIVEN
    while at < end:
        tag = data[at]
        taken, n_given = taken_by[tag], given_by[tag]
        if not taken:
            taken, n_given = _long_element(data, at, n_before + given)
        if at + taken > end:
            break
        at += taken
        given += n_given
    return at, given


def _long_element(data: bytes, at: int, n_before: int) -> tuple[int, int]:
    tag = data[at]
    if tag & 3 == _FAR_COPY:
        if int.from_bytes(data[at + 1 : at + 5], "little") > n_before:
            raise FarReferenceError
        return 5, (tag >> 2) + 1
    width = (tag >> 2) - 59
    n_given = int.from_bytes(data[at + 1 : at + 1 + width], "little") + 1
    return 1 + width + n_given, n_given


def _literal_head(n_bytes: int) -> bytes:
    return bytes([62 << 2]) + (n_bytes - 1).to_bytes(3, "little")


def _written_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
