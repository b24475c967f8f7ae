"""Opening of a source's files: raw or decompressed, through faults of storage, to their proven end."""

from __future__ import annotations

import contextlib
import functools
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from runtime.corpus.faults import Patience
from runtime.corpus.files import MISNAMED_REMEDY, File, FileSet, digest_of_files
from runtime.corpus.locations import compression_of
from runtime.corpus.reading import RetryingFile, is_local
from runtime.corpus.rows import Rows
from runtime.corpus.sources.base import BadFile, Reading
from runtime.corpus.sources.xz import XzReader
from runtime.errors import BabeltowerError, DamagedFileError, InputError
from runtime.storage import GIT_LFS_POINTER

__all__ = ["SKIP_REMEDY", "SourceFiles", "damage_reported"]

T = TypeVar("T")

SKIP_REMEDY = "; --skip-bad-files sets such files aside."

_AT_ONCE = 16
"""Remote files that are opened concurrently to look at their headers."""

_LONGEST_POINTER = 1_024
"""Most bytes of a pointer of Git LFS, by its specification."""


@contextlib.contextmanager
def damage_reported(file: File, format_: str) -> Iterator[None]:
    """Raise what a decoder says of a file's content as a ``DamagedFileError``.

    Faults of storage do not reach a decoder: ``RetryingFile`` raises them as its own errors.
    """
    import pyarrow

    try:
        yield
    except BabeltowerError:
        raise
    except (
        pyarrow.ArrowException,
        tarfile.TarError,
        lzma.LZMAError,
        zlib.error,
        UnicodeDecodeError,
        EOFError,
        OSError,
    ) as error:
        raise DamagedFileError(
            f"{file.shown} cannot be read as {format_} ({' '.join(str(error).split())}). Restore it if it is "
            f"truncated or damaged{SKIP_REMEDY}"
        ) from error


class SourceFiles:
    """Files of one source, and the record of those that were set aside.

    Raises:
        InputError: there are none.
        DamagedFileError: a file's name is not UTF-8.
    """

    def __init__(self, name: str, files: FileSet, reading: Reading, *, what: str) -> None:
        if files.misnamed and not reading.skip_bad_files:
            raise DamagedFileError(
                f"{name} holds a file whose name is not UTF-8: {files.misnamed[0]}. {MISNAMED_REMEDY}"
                f"{SKIP_REMEDY}"
            )
        if not files.files:
            raise InputError(f"{name} holds no {what}.")
        self.all = files
        self.reading = reading
        self.patience = Patience(reading.patience_s)
        self.bad = [BadFile(path, 0, f"The name is not UTF-8. {MISNAMED_REMEDY}.") for path in files.misnamed]
        self.notes: list[str] = list(files.notes)

    def __len__(self) -> int:
        return len(self.all.files)

    def __getitem__(self, number: int) -> File:
        return self.all.files[number]

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return digest_of_files(self.all.files)

    def raw(self, number: int) -> RetryingFile:
        """Open a file as it is stored."""
        file = self[number]
        return RetryingFile(file.filesystem, file.path, file.n_bytes, self.patience)

    @contextlib.contextmanager
    def decompressed(self, number: int, format_: str) -> Iterator[Any]:
        """Open a file below its compression, which is told from its suffix and read to its trailer.

        Raises:
            DamagedFileError: the file is cut off or damaged, here or while the caller reads.
        """
        import pyarrow

        file = self[number]
        compression = compression_of(file.path)
        with damage_reported(file, format_), contextlib.ExitStack() as stack:
            raw: Any = stack.enter_context(contextlib.closing(self.raw(number)))
            if compression is not None and raw.size() == 0:
                raise EOFError("it is empty, without the header of a compressed file")
            if compression == "xz":
                yield stack.enter_context(io.BufferedReader(XzReader(raw)))
                return
            opened = pyarrow.PythonFile(raw, mode="r")
            if compression is not None:
                opened = pyarrow.CompressedInputStream(opened, compression)
            yield stack.enter_context(contextlib.closing(opened))

    def looked_at(self, look: Callable[[int], T]) -> dict[int, T]:
        """Look at every file before any work, and return what was found by number.

        A file that is damaged is set aside if the reading says so. Remote files are opened concurrently.
        """
        numbers = range(len(self))
        look = functools.partial(self._look, look)
        if len(self) > 1 and not all(is_local(file.filesystem) for file in self.all.files):
            with ThreadPoolExecutor(_AT_ONCE, "babeltower-look") as pool:
                pending = [pool.submit(look, number) for number in numbers]
                return self._unless_damaged(lambda number: pending[number].result())
        return self._unless_damaged(look)

    def _look(self, look: Callable[[int], T], number: int) -> T:
        file = self[number]
        if file.n_bytes is not None and file.n_bytes <= _LONGEST_POINTER:
            with contextlib.closing(self.raw(number)) as raw:
                is_pointer = raw.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER
            if is_pointer:
                raise DamagedFileError(
                    f"{file.shown} is a Git LFS pointer of {file.n_bytes} bytes, not the data. Run 'git lfs "
                    f"pull' in its folder, or download the file itself{SKIP_REMEDY}"
                )
        return look(number)

    def _unless_damaged(self, look: Callable[[int], T]) -> dict[int, T]:
        found: dict[int, T] = {}
        for number in range(len(self)):
            try:
                found[number] = look(number)
            except DamagedFileError as error:
                self._set_aside(number, 0, error)
        if not found:
            raise DamagedFileError(
                f"All {len(self)} files of the source are damaged, and no row can be read before the damage: "
                f"{self.bad[0].reason}"
            )
        self._keep(sorted(found))
        return {new: found[old] for new, old in enumerate(sorted(found))}

    def _keep(self, numbers: Sequence[int]) -> None:
        if len(numbers) < len(self):
            self.all = self.all.kept(self[number] for number in numbers)

    def to_proven_end(self, number: int, rows: Iterator[Rows]) -> Iterator[Rows]:
        """Yield a file's rows; where it is damaged, its rows end there if the reading sets files aside."""
        n_rows = 0
        try:
            for piece in rows:
                n_rows = piece.stop
                yield piece
        except DamagedFileError as error:
            self._set_aside(number, n_rows, error)

    def _set_aside(self, number: int, n_rows: int, error: DamagedFileError) -> None:
        if not self.reading.skip_bad_files:
            raise error
        entry = BadFile(self[number].name, n_rows, str(error).replace(SKIP_REMEDY, "."))
        if entry not in self.bad:
            self.bad.append(entry)
