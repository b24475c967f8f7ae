"""A prefix of an object store, through fsspec."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.corpus.faults import Patience
from runtime.corpus.stores.base import Written, reading, writing
from runtime.errors import OutputFaultError
from runtime.extras import import_optional
from runtime.logs import LOGGER
from runtime.storage import sha256_of_file

__all__ = ["ObjectStore"]


class ObjectStore:
    """Objects below a prefix; a file is created by a conditional write, so that one of many workers wins.

    Args:
        filesystem: fsspec file system.
        root: Path of the prefix in it.
        location: URL, for messages.
        patience: Repetition of requests that fail; after it ended, each is tried once until one succeeds.
    """

    # clients of stores raise errors of their own, which are no OSErrors: any error is one of the store

    def __init__(self, filesystem: Any, root: str, location: str, patience: Patience | None = None) -> None:
        self._fs = filesystem
        self._patience = patience or Patience()
        self._root = root.rstrip("/")
        self._location = location.rstrip("/")

    @property
    def location(self) -> str:
        """URL of the prefix."""
        return self._location

    def exists(self) -> bool:
        """Return True if there is any file below the prefix."""
        with reading(self.location, Exception):
            self._fs.invalidate_cache()
            return bool(self._asked("", lambda: self._fs.exists(self._root)))

    def require_conditional_writes(self, name: str) -> None:
        """Warn unless the store refuses to create a file twice; asked with a small file that is removed."""
        try:
            with writing(self.path(name), Exception):
                self._sent(name, lambda: self._fs.pipe_file(self._at(name), b"1", mode="create"))
                try:
                    self._sent(name, lambda: self._fs.pipe_file(self._at(name), b"2", mode="create"))
                except FileExistsError:
                    return
            LOGGER.warning(
                "%s has no conditional writes; let one process at a time write to it", self.location
            )
        finally:
            self.remove(name)

    def names(self, folder: str = "") -> Mapping[str, int]:
        """Return the objects directly below a folder."""
        at = self._at(folder) if folder else self._root
        with reading(self.path(folder), Exception):
            self._fs.invalidate_cache()
            try:
                entries = self._asked(folder, lambda: self._fs.ls(at, detail=True))
            except FileNotFoundError:
                return {}
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {
            name: int(entry["size"] or 0)
            for name, entry in found.items()
            if entry["type"] == "file" and name and not name.startswith(".")
        }

    def read(self, name: str) -> bytes | None:
        """Return an object's content."""
        with reading(self.path(name), Exception):
            try:
                data: bytes = self._asked(name, lambda: self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None
            return data

    def read_all(self, names: list[str]) -> Mapping[str, bytes]:
        """Return the contents of several objects, read at once where the file system can."""
        if not names:
            return {}
        with reading(self.location, Exception):
            found = self._asked(
                "", lambda: self._fs.cat([self._at(name) for name in names], on_error="return")
            )
            if not isinstance(found, dict):
                found = {self._at(names[0]): found}
            contents = {}
            for name in names:
                data = found.get(self._at(name), found.get(self._at(name).lstrip("/")))
                if isinstance(data, bytes):
                    contents[name] = data
                elif isinstance(data, Exception) and (again := self.read(name)) is not None:
                    contents[name] = again
        return contents

    def create(self, name: str, data: bytes, *, durably: bool = True) -> bool:
        """Create an object unless it exists.

        A repeated request may meet its own first attempt, whose answer was lost: then the object holds
        ``data``.
        """
        with writing(self.path(name), Exception):
            try:
                self._sent(name, lambda: self._fs.pipe_file(self._at(name), data, mode="create"))
            except FileExistsError:
                return self.read(name) == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        with writing(self.path(name), Exception):
            self._sent(name, lambda: self._fs.pipe_file(self._at(name), data))

    def publish(self, name: str, write: Callable[[Path], Any]) -> Written | None:
        """Write a temporary file and upload it."""
        with tempfile.TemporaryDirectory(prefix="babeltower-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            with writing(str(path)):
                write(path)
                written = Written(path.stat().st_size, sha256_of_file(path))
            with writing(self.path(name), Exception):
                try:
                    self._sent(name, lambda: self._fs.put_file(str(path), self._at(name), mode="create"))
                except FileExistsError:
                    return None
        return written

    def remove(self, name: str) -> None:
        """Remove an object."""
        with writing(self.path(name), Exception):
            try:
                self._sent(name, lambda: self._fs.rm_file(self._at(name)))
            except FileNotFoundError:
                return

    def remove_unfinished(self, stem: str) -> None:
        """Do nothing: an object is complete or absent."""

    def remove_empty(self, folder: str) -> None:
        """Do nothing: an object store has no empty folders."""

    def path(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.location}/{name}" if name else self.location

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow file system, and the prefix in it."""
        module = import_optional("pyarrow.fs", "A corpus", "babeltower[corpus]")
        return module.PyFileSystem(module.FSSpecHandler(self._fs)), self._root

    def _asked(self, name: str, request: Callable[[], Any]) -> Any:
        return self._repeated(name, "read", request)

    def _sent(self, name: str, request: Callable[[], Any]) -> Any:
        return self._repeated(name, "written", request)

    def _repeated(self, name: str, verb: str, request: Callable[[], Any]) -> Any:
        """Repeat a request, each of which may be sent twice, while its fault may pass."""
        try:
            answer = self._patience.call(self.path(name), request, verb=verb, fault=OutputFaultError)
        except OutputFaultError:
            self._patience.end()
            raise
        self._patience.renew()
        return answer

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"
