"""Reading of ``.xz`` files to their proven end: ``lzma.open`` takes any bytes after a stream for its end."""

from __future__ import annotations

import io
import lzma
from typing import Any

__all__ = ["XzReader"]

_READ_BYTES = 1 << 16
_PADDING_MULTIPLE = 4
"""Streams may be followed by zero bytes, in multiples of four."""


class XzReader(io.RawIOBase):
    """Decompressed content of all streams of a file.

    Raises:
        EOFError: while reading, the last stream is cut off.
        lzma.LZMAError: the content is damaged, or something else follows a stream.
    """

    def __init__(self, compressed: Any) -> None:
        super().__init__()
        self._compressed = compressed
        self._decompressor = lzma.LZMADecompressor()
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes; 0 only at the proven end."""
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _some(self, most: int) -> bytes:
        while True:
            if self._decompressor.eof and not self._next_stream():
                return b""
            given = b""
            if self._decompressor.needs_input:
                given, self._rest = self._rest or self._compressed.read(_READ_BYTES), b""
                if not given:
                    raise EOFError("it ends before the end of its stream")
            if data := self._decompressor.decompress(given, most):
                return data

    def _next_stream(self) -> bool:
        """Begin the stream after the one that ended; False at the end of the file."""
        rest = self._decompressor.unused_data
        n_padding = 0
        while not (stripped := rest.lstrip(b"\0")):
            n_padding += len(rest)
            rest = self._compressed.read(_READ_BYTES)
            if not rest:
                if n_padding % _PADDING_MULTIPLE:
                    raise lzma.LZMAError(f"{n_padding} zero bytes follow its last stream")
                return False
        if (n_padding + len(rest) - len(stripped)) % _PADDING_MULTIPLE:
            raise lzma.LZMAError("zero bytes between its streams are not padding")
        self._decompressor = lzma.LZMADecompressor()
        self._rest = stripped
        return True
