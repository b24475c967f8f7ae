"""A local folder, or one of a network file system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.corpus.stores.base import Written, reading, writing
from runtime.errors import CorpusError
from runtime.extras import import_optional
from runtime.storage import create_file, replace_file, sha256_of_file

__all__ = ["LocalStore"]


class LocalStore:
    """Files below a folder of this machine; needs neither locks nor hard links of the file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        """Path of the folder."""
        return str(self.folder)

    def exists(self) -> bool:
        """Return True if the folder exists.

        Raises:
            CorpusError: it, or a folder above it, is a file.
        """
        for path in (self.folder, *self.folder.parents):
            if path.is_dir():
                return path == self.folder
            if path.exists():
                raise CorpusError(
                    f"{self.folder} is not a folder, so no output can be written to it. Choose another "
                    "output folder."
                )
        return False

    def names(self, folder: str = "") -> Mapping[str, int]:
        """Return the files directly in a folder."""
        found: dict[str, int] = {}
        with reading(self.path(folder)):
            try:
                entries = list((self.folder / folder).iterdir())
            except FileNotFoundError:
                return found
            except NotADirectoryError:
                self.exists()  # raises an error that names the folder
                raise
            for entry in entries:
                if not entry.name.startswith("."):
                    try:
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
                    except FileNotFoundError:  # another worker removed it meanwhile
                        continue
        return found

    def read(self, name: str) -> bytes | None:
        """Return a file's content."""
        with reading(self.path(name)):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def read_all(self, names: list[str]) -> Mapping[str, bytes]:
        """Return the contents of several files."""
        return {name: data for name in names if (data := self.read(name)) is not None}

    def create(self, name: str, data: bytes, *, durably: bool = True) -> bool:
        """Create a file unless it exists."""
        with writing(self.path(name)):
            try:
                create_file(self.folder / name, lambda path: path.write_bytes(data), durably=durably)
            except FileExistsError:
                return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a file."""
        path = self.folder / name
        with writing(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda unfinished: unfinished.write_bytes(data))

    def publish(self, name: str, write: Callable[[Path], Any]) -> Written | None:
        """Create a large file."""
        written: list[Written] = []

        def write_and_hash(path: Path) -> None:
            write(path)
            written.append(Written(path.stat().st_size, sha256_of_file(path)))

        with writing(self.path(name)):
            try:
                create_file(self.folder / name, write_and_hash)
            except FileExistsError:
                return None
        return written[0]

    def remove(self, name: str) -> None:
        """Remove a file."""
        with writing(self.path(name)):
            (self.folder / name).unlink(missing_ok=True)

    def remove_unfinished(self, stem: str) -> None:
        """Remove what killed processes left half-written."""
        folder, _, start = stem.rpartition("/")
        with writing(self.path(stem)):
            for path in (self.folder / folder).glob(f".{start}*.part"):
                path.unlink(missing_ok=True)

    def remove_empty(self, folder: str) -> None:
        """Remove a folder if it exists and is empty."""
        path = self.folder / folder
        with writing(str(path)):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow file system, and the folder's path."""
        module = import_optional("pyarrow.fs", "A corpus", "babeltower[corpus]")
        return module.LocalFileSystem(), str(self.folder.absolute())
