"""Reading of files from any file system: whole, or as a file object that outlasts faults of storage."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runtime.corpus.faults import Patience, ShortReadError, without_query
from runtime.errors import ChangedInputError

__all__ = ["MOST_BYTES_AT_ONCE", "RetryingFile", "Stamp", "fetched", "fsspec_of", "is_local"]

MOST_BYTES_AT_ONCE = 1 << 30
"""Largest file that is read as a whole, such as an image."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and modification time of a file as it was read; the time is ``None`` for remote files."""

    n_bytes: int
    mtime_ns: int | None


def is_local(filesystem: Any) -> bool:
    """Check whether a pyarrow file system is this machine's."""
    return type(filesystem).__name__ == "LocalFileSystem"


def fsspec_of(filesystem: Any) -> Any | None:
    """Return the fsspec file system behind a pyarrow one, or ``None``.

    pyarrow's adapter reports every failed request as a missing file, so fsspec is called directly.
    """
    return getattr(getattr(filesystem, "handler", None), "fs", None)


def fetched(filesystem: Any, path: str) -> tuple[bytes, Stamp]:
    """Read a whole file, once; errors are those of the file system.

    Raises:
        OSError: it cannot be read, is no regular file, is larger than 1 GiB, or came short.
    """
    if is_local(filesystem):
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(f"{path} is not a regular file")
        _require_bounded(path, found.st_size)
        with Path(path).open("rb") as file:
            data = file.read(found.st_size + 1)
        _require_length(path, len(data), found.st_size)
        return data, Stamp(found.st_size, found.st_mtime_ns)
    fsspec = fsspec_of(filesystem)
    if fsspec is not None:
        data = fsspec.cat_file(path)
    else:
        with filesystem.open_input_file(path) as opened:
            size = opened.size()
            _require_bounded(path, size)
            data = opened.read()
        _require_length(path, len(data), size)
    return data, Stamp(len(data), None)


def _require_bounded(path: str, n_bytes: int) -> None:
    if n_bytes > MOST_BYTES_AT_ONCE:
        raise ValueError(f"{path} has {n_bytes:,} bytes; at most {MOST_BYTES_AT_ONCE:,} are read as one item")


def _require_length(path: str, n_bytes: int, expected: int) -> None:
    if n_bytes != expected:
        raise ShortReadError(f"{path} gave {n_bytes:,} of {expected:,} bytes")


class RetryingFile(io.RawIOBase):
    """Read-only file that is opened again, at the same position, when its storage fails.

    Args:
        n_bytes: Size when it was listed; an earlier end is a fault of storage, and another size means that
            the file was changed. ``None`` if it is unknown.

    Raises:
        InputFaultError: a fault did not pass in time.
        ChangedInputError: the file has another size than when it was listed.
    """

    def __init__(self, filesystem: Any, path: str, n_bytes: int | None, patience: Patience) -> None:
        super().__init__()
        self._filesystem, self._path, self._patience = filesystem, path, patience
        self._n_bytes = n_bytes
        self._position = 0
        self._inner: Any = None
        self._inner_at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: a stream that cannot seek is read again up to the position."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; nothing is read before the next read."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self.size()
        self._position = max(0, offset)
        return self._position

    def size(self) -> int:
        """Return the size in bytes."""
        if self._n_bytes is None:
            self._n_bytes = self._patience.call(self._name, self._found_size, absent_may_pass=True)
        return self._n_bytes

    def read(self, size: int | None = -1) -> bytes:
        """Read up to ``size`` bytes; fewer only at the file's end."""
        if size is None or size < 0:
            pieces = []
            while piece := self.read(1 << 20):
                pieces.append(piece)
            return b"".join(pieces)
        found = b""
        while len(found) < size:
            missing = size - len(found)
            piece = self._patience.call(self._name, partial(self._read_once, missing), absent_may_pass=True)
            if not piece:
                break
            self._position += len(piece)
            found = piece if not found else found + piece
        return found

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._drop()
        super().close()

    @property
    def _name(self) -> str:
        return without_query(self._path)

    def _found_size(self) -> int:
        if self._inner is None:
            self._open()
        size = getattr(self._inner, "size", None)
        found = size() if callable(size) else size
        if not isinstance(found, int):
            raise io.UnsupportedOperation(f"the size of {self._name} is unknown")
        return found

    def _read_once(self, n_bytes: int) -> bytes:
        if self._n_bytes is not None and self._position >= self._n_bytes:
            return b""
        try:
            if self._inner is None:
                self._open()
            self._move()
            data = bytes(self._inner.read(n_bytes))
        except BaseException:
            self._drop()
            raise
        if not data and self._n_bytes is not None:
            self._drop()
            raise ShortReadError(f"it ended after {self._position:,} of {self._n_bytes:,} bytes")
        self._inner_at += len(data)
        return data

    def _open(self) -> None:
        if is_local(self._filesystem):
            self._inner = io.FileIO(self._path)
            found = os.fstat(self._inner.fileno())
            size = found.st_size if stat.S_ISREG(found.st_mode) else None
        elif (fsspec := fsspec_of(self._filesystem)) is not None:
            self._inner = fsspec.open(self._path, "rb", block_size=1 << 20)
            size = getattr(self._inner, "size", None)
        else:
            self._inner = self._filesystem.open_input_file(self._path)
            size = self._inner.size() if callable(self._inner.size) else None
        self._inner_at = 0
        if self._n_bytes is not None and isinstance(size, int) and size != self._n_bytes:
            self._drop()
            raise ChangedInputError(
                f"{self._name} had {self._n_bytes:,} bytes when the source was listed and now has {size:,}. "
                "Let its writer finish, or restore it, and run the command again."
            )

    def _move(self) -> None:
        if self._inner_at == self._position:
            return
        try:
            self._inner.seek(self._position)
            self._inner_at = self._position
        except (ValueError, io.UnsupportedOperation, NotImplementedError):  # a stream: read up to there
            if self._inner_at > self._position:
                self._drop()
                self._open()
            while self._inner_at < self._position:
                data = self._inner.read(min(1 << 20, self._position - self._inner_at))
                if not data:
                    raise ShortReadError(
                        f"it ended after {self._inner_at:,} of {self._position:,} bytes"
                    ) from None
                self._inner_at += len(data)

    def _drop(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            try:
                inner.close()
            except Exception:  # the file failed before; what it says at its end adds nothing
                return
