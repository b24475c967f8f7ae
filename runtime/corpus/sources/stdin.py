"""Standard input as a file of a corpus: read once; its beginning can be looked at before."""

from __future__ import annotations

import io
import sys
from typing import Any

from runtime.corpus.files import File, FileSet
from runtime.errors import InputError

__all__ = ["STANDARD_INPUT", "files_of_standard_input", "is_standard_input"]

STANDARD_INPUT = "-"
_KEPT_BYTES = 32 << 20


class _StandardInput:
    """File system with one file, whose first 32 MB can be read again until it is read further."""

    type_name = "stdin"

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._head = bytearray()
        self._is_past_head = False

    def open_input_file(self, path: str) -> Any:
        """Open standard input from its beginning.

        Raises:
            InputError: it has been read already.
        """
        if self._is_past_head:
            raise InputError(
                "Standard input can be read once only. Write it to a file to read it again or on Ray's "
                "workers."
            )
        return _View(self)

    def read_at(self, position: int, n_bytes: int) -> bytes:
        """Read from a position in the beginning, or on from where the last read ended."""
        if position < len(self._head):
            return bytes(self._head[position : position + n_bytes])
        data: bytes = self._stream.read(n_bytes)
        if len(self._head) + len(data) <= _KEPT_BYTES and not self._is_past_head:
            self._head += data
        elif data:
            self._is_past_head, self._head = True, bytearray()
        return data

    def __reduce__(self) -> Any:
        raise InputError("Standard input cannot be sent to Ray's workers. Write it to a file first.")


class _View(io.RawIOBase):
    """One reading of standard input, in order."""

    size = None

    def __init__(self, source: _StandardInput) -> None:
        super().__init__()
        self._source, self._at = source, 0

    def read(self, n_bytes: int | None = -1) -> bytes:
        """Read the next bytes."""
        data = self._source.read_at(self._at, 1 << 20 if n_bytes is None or n_bytes < 0 else n_bytes)
        self._at += len(data)
        return data


def is_standard_input(file: File) -> bool:
    """Check whether a file is standard input, which is read only once."""
    return isinstance(file.filesystem, _StandardInput)


def files_of_standard_input(name: str | None) -> FileSet:
    """Return standard input as the only file of a source, under the name that a run resumes it by."""
    file = File(_StandardInput(sys.stdin.buffer), STANDARD_INPUT, name or STANDARD_INPUT, None)
    return FileSet((file,), False)
