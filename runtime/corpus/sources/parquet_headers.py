"""Headers, levels and dictionary numbers of Parquet pages.

Source:
    Apache Parquet's format: ``parquet.thrift`` (page headers, in Thrift's compact protocol) and
    ``Encodings.md`` (the hybrid of runs and bit-packed groups).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Page", "PageKind", "numbers_from_hybrid", "page_at", "varint"]

_HEADER_BYTES = 1 << 12
_LONGEST_HEADER = 1 << 24
_LONGEST_VARINT = 10
"""Bytes of a number of 64 bits."""


class PageKind(int, Enum):
    """Kind of a page; others are skipped."""

    DATA = 0
    DICTIONARY = 2
    DATA_V2 = 3


_FIELD_OF_KIND = {PageKind.DATA: 5, PageKind.DICTIONARY: 7, PageKind.DATA_V2: 8}


@dataclass(frozen=True, slots=True)
class Page:
    """Header of a page; sizes in bytes.

    Attributes:
        fields: Header of the page's kind: field number → value.
        crc: CRC-32 of the page's bytes as they are stored; ``None`` if the writer left it out.
    """

    kind: int
    n_unpacked: int
    n_packed: int
    crc: int | None
    fields: dict[int, Any]

    @property
    def levels_bytes(self) -> int:
        """Bytes of the levels before the values, which pages of version 2 do not compress."""
        return int(self.fields[5] + self.fields[6]) if self.kind == PageKind.DATA_V2 else 0

    @property
    def n_values(self) -> int:
        """Values of the page, with nulls."""
        return int(self.fields[1])

    @property
    def is_packed(self) -> bool:
        """True unless a page of version 2 says that it is not compressed."""
        return self.kind != PageKind.DATA_V2 or bool(self.fields.get(7, True))


def numbers_from_hybrid(data: bytes, width: int, n_values: int) -> NDArray[np.int64]:
    """Decode runs and bit-packed groups of 8 into numbers.

    Args:
        width: Bits of a number.

    Returns:
        int64 (n_values,).

    Raises:
        EOFError: there are fewer.
    """
    found = np.zeros(n_values, dtype=np.int64)
    if not width:
        return found
    at, n = 0, 0
    weights = 1 << np.arange(width, dtype=np.int64)
    n_bytes = (width + 7) // 8
    while n < n_values:
        try:
            head, at = varint(data, at)
        except IndexError:
            raise EOFError("a page's levels or numbers end early") from None
        if head & 1:
            stop = at + (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[at:stop], np.uint8), bitorder="little")
            numbers = bits[: len(bits) // width * width].reshape(-1, width) @ weights
            taken = numbers[: n_values - n]
        else:
            stop = at + n_bytes
            number = int.from_bytes(data[at:stop], "little")
            taken = np.full(min(head >> 1, n_values - n), number, dtype=np.int64)
        if not len(taken):
            raise EOFError("a page's levels or numbers end early")
        found[n : n + len(taken)] = taken
        n, at = n + len(taken), stop
    return found


def page_at(file: Any, at: int, stop: int) -> tuple[Page, int]:
    """Read the header of a page at an offset: the page, and the size of its header in bytes.

    Args:
        stop: End of the column chunk.

    Raises:
        EOFError: the header is cut off or damaged.
    """
    size = _HEADER_BYTES
    while True:
        file.seek(at)
        data = bytes(file.read(min(size, stop - at)))
        try:
            fields, n_bytes = _struct(data, 0)
            break
        except IndexError:
            if len(data) < size or size >= _LONGEST_HEADER:
                raise EOFError("a page's header is cut off or damaged") from None
            size *= 16
        except RecursionError:
            raise EOFError("a page's header is damaged") from None
    kind = fields.get(1, -1)
    own = fields.get(_FIELD_OF_KIND.get(kind, -1), {})
    needed = {PageKind.DATA: {1, 2, 3}, PageKind.DICTIONARY: {1}, PageKind.DATA_V2: {1, 4, 5, 6}}
    if min(fields.get(2, -1), fields.get(3, -1)) < 0 or not needed.get(kind, set()).issubset(own):
        raise EOFError("a page's header is damaged")
    return Page(kind, fields[2], fields[3], fields.get(4), own), n_bytes


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode an unsigned number that is stored in 7 bits a byte: the number, and its end.

    Raises:
        IndexError: it is cut off.
        EOFError: it has more than 64 bits.
    """
    value = 0
    for i in range(_LONGEST_VARINT):
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise EOFError("a number of a page or its header has more than 64 bits")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Decode a struct of Thrift's compact protocol: field number → value, and its end."""
    found: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _signed(data, at)
        found[number], at = _value(data, at, head & 15)
    return found, at + 1


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:
            return kind == 1, at
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            return _signed(data, at)
        case 7:
            data[at + 7]  # raises IndexError where the header is cut off
            return data[at : at + 8], at + 8
        case 8:
            n_bytes, at = varint(data, at)
            data[at + n_bytes]  # a struct's end follows
            return data[at : at + n_bytes], at + n_bytes
        case 9 | 10:
            head, at = data[at], at + 1
            n, of = head >> 4, head & 15
            if n == 15:
                n, at = varint(data, at)
            values = []
            for _ in range(n):
                value, at = (data[at] == 1, at + 1) if of in (1, 2) else _value(data, at, of)
                values.append(value)
            return values, at
        case 12:
            return _struct(data, at)
    raise EOFError(f"a page's header holds a value of type {kind}")
