"""Reading of the image files behind rows, which tells a missing file from a folder that went away.

A file that is not there is its row's own problem only while its store is: another picture of the same place
can be seen, or the file's folder holds others. A folder that is gone or suddenly empty, as below an unmounted
disk, is a fault of storage: it is waited for, and then the row's part is left undone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from runtime.corpus.faults import FaultKind, Patience, fault_kind, without_query
from runtime.corpus.reading import Stamp, is_local
from runtime.corpus.rows import ImageFile, Item, Problem
from runtime.errors import InputFaultError

__all__ = ["MISSING", "MISSING_FOLDER", "Picture", "PictureReader", "has_entries"]

MISSING_FOLDER = "missing-folder"
"""Kind of rows whose file's whole folder is missing; their parts are done again once it is there."""

MISSING = -1
"""Size of a picture that was not there."""

_READS_AT_ONCE = 16
_MOST_WITNESSES = 1_024
_FOLDER_WAIT_S = 3.0


@dataclass(frozen=True, slots=True)
class Picture:
    """Image file behind a path column, as it was read.

    Attributes:
        n_bytes: Size; ``MISSING`` for a file whose folder was not there.
        mtime_ns: Modification time; ``None`` for remote and missing files.
    """

    path: str
    n_bytes: int
    mtime_ns: int | None


class PictureReader:
    """Reader of image files, safe to use from several threads.

    Args:
        skip_bad_files: Call rows bad whose files cannot be read even after waiting, instead of leaving their
            parts undone.
    """

    def __init__(self, patience: Patience, *, skip_bad_files: bool = False) -> None:
        self._patience = patience
        self._skips = skip_bad_files
        self._witnesses: dict[str, str] = {}
        self._lock = threading.Lock()
        self._has_waited = False

    @contextmanager
    def reading(self) -> Iterator[Callable[[Sequence[Item]], list[tuple[Item, Picture | None]]]]:
        """Yield a function that reads the files among items; remote files are read concurrently."""
        with ThreadPoolExecutor(_READS_AT_ONCE, "babeltower-read") as pool:

            def read(items: Sequence[Item]) -> list[tuple[Item, Picture | None]]:
                files = [item for item in items if isinstance(item, ImageFile)]
                if all(is_local(file.filesystem) for file in files):
                    return [self.read(item) for item in items]
                return list(pool.map(self.read, items))

            yield read

    def read(self, item: Item) -> tuple[Item, Picture | None]:
        """Return an item with its file read, or the row's problem, and the file as it was found.

        Raises:
            InputFaultError: storage failed until the patience ended, and no other read succeeded meanwhile.
        """
        if not isinstance(item, ImageFile):
            return item, None
        started = time.monotonic()
        try:
            data, stamp = self._patience.call(_name(item), lambda: self._once(item))
        except InputFaultError as error:
            if self._skips:
                return Problem("unreadable-file", str(error)), None
            if self._patience.succeeded_since(started):  # the store answers: this file alone fails
                return Problem("storage-fault", str(error), may_pass=True), None
            raise
        except _FolderMissingError as error:
            reason = f"{item.words_on_absence}, nor does its folder {error}."
            return Problem(MISSING_FOLDER, reason), Picture(item.target, MISSING, None)
        except Exception as error:
            problem = item.problem_of(error)
            if problem is None:
                raise
            return problem, None
        if is_local(item.filesystem):
            seen = item.target
            if len(self._witnesses) < _MOST_WITNESSES:
                self._witnesses[str(Path(seen).parent)] = seen
            self._witnesses[""] = seen
        picture = None if item.is_listed else Picture(without_query(item.path), stamp.n_bytes, stamp.mtime_ns)
        return data, picture

    def _once(self, item: ImageFile) -> tuple[bytes, Stamp]:
        try:
            return item.fetched()
        except Exception as error:
            if fault_kind(error) is FaultKind.ABSENT:
                match self._absence(item):
                    case _Absence.STORE:
                        link = "" if item.target == item.path else f" (a link to {item.target})"
                        raise OSError(
                            f"it{link} is missing, and so is what lay beside it; its disk or mount may be "
                            "away. If it is not, --skip-bad-files calls such rows bad"
                        ) from error
                    case _Absence.FOLDER:
                        self._wait_for_folder()
                        if not Path(item.target).parent.is_dir():
                            raise _FolderMissingError(str(Path(item.target).parent)) from error
                        return item.fetched()
            raise

    def _wait_for_folder(self) -> None:
        """Wait a little where a folder is missing that no file was read from: once, as it may never exist."""
        with self._lock:
            if not self._has_waited:
                self._has_waited = True
                self._patience.pause(_FOLDER_WAIT_S)

    def _absence(self, item: ImageFile) -> _Absence:
        """Tell what is missing: one file while its store is there, a folder not seen before, or the store.

        It is judged twice: while a mount goes or comes, what is seen first and last may not fit together.
        """
        found = self._absence_now(item)
        return found if self._absence_now(item) is found else _Absence.STORE

    def _absence_now(self, item: ImageFile) -> _Absence:
        """Tell what is missing; a link is judged by the place of its target, such as git-annex's folder."""
        if not is_local(item.filesystem):
            return _Absence.STORE if item.is_listed else _Absence.FILE
        if item.is_listed:
            return _Absence.STORE
        path = item.target
        folder = Path(path).parent
        witness = self._witnesses.get(str(folder))
        last = self._witnesses.get("")
        if witness is not None:
            return _Absence.FILE if _exists(witness) and not _exists(path) else _Absence.STORE
        if last is not None and not _exists(last):
            return _Absence.STORE
        above = next((above for above in (folder, *folder.parents) if above.is_dir()), None)
        if above is None or not has_entries(above):
            return _Absence.STORE
        if above == folder:
            return _Absence.STORE if _exists(path) else _Absence.FILE
        # the folder itself is missing: a file's own fault only beside a picture that can still be seen
        is_beside = last is not None and Path(last).is_relative_to(above)
        return _Absence.FILE if is_beside else _Absence.FOLDER


class _Absence(Enum):
    FILE = "file"
    FOLDER = "folder"
    STORE = "store"


class _FolderMissingError(FileNotFoundError):
    """A folder is missing that no picture was read from so far."""


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def has_entries(folder: Path) -> bool:
    """Check whether a folder exists and is not empty, as that below an unmounted disk is."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


def _name(item: ImageFile) -> str:
    return f"The image {without_query(item.path)}"
