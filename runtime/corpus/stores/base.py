"""Interface of the places that a run writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.corpus.faults import FaultKind, fault_kind
from runtime.errors import BabeltowerError, CorpusError, OutputFaultError

__all__ = ["Store", "Written", "reading", "writing"]


@dataclass(frozen=True, slots=True)
class Written:
    """Size in bytes and SHA-256 of a file."""

    n_bytes: int
    sha256: str


class Store(Protocol):
    """Files below one folder, each complete under its name or absent; names are relative, with ``/``.

    Attributes:
        location: Path or URL of the folder.

    Every method raises a ``CorpusError`` if the store cannot be read or written: an ``OutputFaultError`` if
    that may pass, as with a full disk or a store that does not answer.
    """

    @property
    def location(self) -> str: ...

    def exists(self) -> bool:
        """Return True if the folder exists; an object store has only the folders of its files."""

    def names(self, folder: str = "") -> Mapping[str, int]:
        """Return the files directly in a folder, without hidden ones: name relative to it → size."""

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or ``None`` if there is no such file."""

    def read_all(self, names: list[str]) -> Mapping[str, bytes]:
        """Return the contents of several files; missing ones are left out."""

    def create(self, name: str, data: bytes, *, durably: bool = True) -> bool:
        """Create a file unless it exists; of several processes exactly one succeeds.

        Returns:
            True if the file now holds this call's ``data``; False if another process was first.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a file."""

    def publish(self, name: str, write: Callable[[Path], Any]) -> Written | None:
        """Create a large file from what ``write`` writes to a local path.

        Returns:
            ``None`` if a file of this name exists; it is unchanged.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def remove_unfinished(self, stem: str) -> None:
        """Remove what killed processes left half-written of files whose name begins with ``stem``."""

    def remove_empty(self, folder: str) -> None:
        """Remove a folder if it exists and is empty."""

    def path(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow file system, and the path of the folder in it."""


@contextlib.contextmanager
def writing(path: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Turn errors of a write, by default ``OSError``, into the one that the user of a corpus needs."""
    with _faults_reported(path, "written", errors):
        yield


@contextlib.contextmanager
def reading(path: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Turn errors of a read, by default ``OSError``, into the one that the user of a corpus needs."""
    with _faults_reported(path, "read", errors):
        yield


@contextlib.contextmanager
def _faults_reported(path: str, verb: str, errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except BabeltowerError:
        raise
    except errors as error:
        may_pass = fault_kind(error) in (FaultKind.PASSING, FaultKind.DENIED)
        raise (OutputFaultError if may_pass else CorpusError)(
            f"{path} cannot be {verb}: {error}. {_REMEDIES[verb]}, and run the same command again to resume."
        ) from error


_REMEDIES = {
    "written": "Free space or mend the disk or the connection",
    "read": "Mend the disk or the connection",
}
