"""Links of a tar: what they lead to is found in the same tar, which is read again for it."""

from __future__ import annotations

import contextlib
import io
import posixpath
from dataclasses import dataclass, field
from tarfile import TarFile, TarInfo
from typing import Any

from runtime.corpus.locations import compression_of
from runtime.corpus.rows import Problem
from runtime.corpus.sources.opened import SourceFiles
from runtime.corpus.sources.stdin import is_standard_input
from runtime.corpus.sources.strict_tar import members_of_tar
from runtime.errors import DamagedFileError

__all__ = ["TarLinks"]

_MOST_STEPS = 16
"""Links that lead to links, one after the other."""

_MOST_REWINDS = 64
"""Times that a compressed tar is decompressed again for members that lie before the last one read."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Member of a tar; ``target`` is the normalised name that a link leads to, ``None`` of other members."""

    at: int
    at_data: int
    n_bytes: int
    sparse: Any
    is_file: bool
    is_hard: bool
    target: str | None


@dataclass(frozen=True, slots=True)
class _Index:
    """Members and folders of the tars in a file, by the number of the tar and the normalised name."""

    members: dict[tuple[int, str], list[_Entry]] = field(default_factory=dict)
    folders: set[tuple[int, str]] = field(default_factory=set)

    def add(self, member: TarInfo, n_tars: int) -> None:
        """Add a member, and the folders that its name is in."""
        name = posixpath.normpath(member.name)
        folder = posixpath.dirname(name)
        while folder and (n_tars, folder) not in self.folders:
            self.folders.add((n_tars, folder))
            folder = posixpath.dirname(folder) if folder != "/" else ""
        if member.isdir():
            self.folders.add((n_tars, name))
            return
        self.members.setdefault((n_tars, name), []).append(
            _Entry(
                member.offset,
                member.offset_data,
                member.size,
                member.sparse,
                member.isfile(),
                member.islnk(),
                _target(member),
            )
        )

    def entry(self, link: TarInfo, n_tars: int) -> _Entry | Problem | None:
        """Follow links to a file's entry; ``None`` for a folder."""
        target, before = _target(link), link.offset if link.islnk() else None
        for _ in range(_MOST_STEPS):
            assert target is not None, "it is a link's"
            entries = self.members.get((n_tars, target), [])
            if before is not None:  # a hard link is to what was stored last under the name
                entries = [entry for entry in entries if entry.at < before][-1:]
            if not entries:
                if (n_tars, target) in self.folders:
                    return None
                return _unresolved(link, "the tar does not hold it" + (" before the link" if before else ""))
            if len(entries) > 1:
                places = " and ".join(f"{entry.at:,}" for entry in entries[:2])
                reason = f"{_shown(link)}, which the tar holds more than once, at bytes {places}. Remove one."
                return Problem("ambiguous-sample", reason)
            (found,) = entries
            if found.target is None:
                return found if found.is_file else _unresolved(link, "it is a device or a named pipe")
            target, before = found.target, found.at if found.is_hard else None
        return _unresolved(link, f"more than {_MOST_STEPS} links lead from one to the next, or in a circle")


def _index_of_tar(files: SourceFiles, number: int) -> _Index:
    """Read a file of tars for the places of its members; of a damaged one, of those before the damage."""
    index = _Index()
    with contextlib.suppress(DamagedFileError), files.decompressed(number, "a tar") as opened:
        for member, _, n_tars in members_of_tar(opened):
            index.add(member, n_tars)
    return index


class _TooManyRewindsError(Exception):
    """A compressed tar would be decompressed again too often."""


class TarLinks:
    """Contents of links. All members' positions are found by one more reading, at the first link."""

    def __init__(self, files: SourceFiles, number: int) -> None:
        self._files, self._number = files, number
        self._index: _Index | None = None
        self._opened: Any = None

    def close(self) -> None:
        """Close the second reading."""
        if self._opened is not None:
            self._opened.close()

    def content(self, link: TarInfo, n_tars: int, most: int) -> bytes | Problem | None:
        """Return what a link leads to, the problem with it, or ``None`` for a folder.

        Args:
            n_tars: Number of the tar in its file, from 0; links do not lead from one to another.
            most: Largest content that is read, in bytes.
        """
        if is_standard_input(self._files[self._number]):
            return _unresolved(link, "standard input is read only once; write it to a file")
        if self._index is None:
            self._index = _index_of_tar(self._files, self._number)
        found = self._index.entry(link, n_tars)
        if found is None or isinstance(found, Problem):
            return found
        if found.n_bytes > most:
            reason = f"{_shown(link)}, which has {found.n_bytes:,} bytes; at most {most:,} are read."
            return Problem("too-large-file", reason)
        try:
            return self._read(found)
        except _TooManyRewindsError:
            return _unresolved(
                link, f"the tar was decompressed {_MOST_REWINDS} times for other links; decompress it first"
            )

    def _read(self, entry: _Entry) -> bytes:
        if self._opened is None:
            file = self._files[self._number]
            if compression_of(file.path) is None:
                self._opened = io.BufferedReader(self._files.raw(self._number))
            else:
                self._opened = io.BufferedReader(_Rewound(self._files, self._number))
        info = TarInfo()
        info.offset_data, info.size, info.sparse = entry.at_data, entry.n_bytes, entry.sparse
        tar: Any = _Opened(self._opened)
        data: bytes = TarFile.fileobject(tar, info).read()
        if len(data) != entry.n_bytes:
            raise EOFError("the file is cut off in a member that a link leads to")
        return data


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a member's content is read through: the seekable file of its tar."""

    fileobj: Any


class _Rewound(io.RawIOBase):
    """Decompressed content with seeking: forwards by reading on, backwards by decompressing again."""

    def __init__(self, files: SourceFiles, number: int) -> None:
        super().__init__()
        self._files, self._number = files, number
        self._stack = contextlib.ExitStack()
        self._stream: Any = None
        self._at = self._stream_at = self._n_rewinds = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, counted from the beginning or from where it is; nothing is read yet."""
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end.

        Raises:
            _TooManyRewindsError: it was decompressed again too often.
        """
        if self._stream is None or self._at < self._stream_at:
            self._n_rewinds += 1
            if self._n_rewinds > _MOST_REWINDS:
                raise _TooManyRewindsError
            self._stack.close()
            self._stream = self._stack.enter_context(self._files.decompressed(self._number, "a tar"))
            self._stream_at = 0
        while self._stream_at < self._at:
            skipped = self._stream.read(min(1 << 20, self._at - self._stream_at))
            if not skipped:
                return 0
            self._stream_at += len(skipped)
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._stream_at += len(data)
        self._at = self._stream_at
        return len(data)

    def close(self) -> None:
        """Close the stream."""
        self._stack.close()
        super().close()


def _target(member: TarInfo) -> str | None:
    """Return the normalised name that a link leads to; ``None`` for other members."""
    if member.islnk():
        return posixpath.normpath(member.linkname)
    if member.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    return None


def _shown(link: TarInfo) -> str:
    return f"{link.name} is a link to {link.linkname}"


def _unresolved(link: TarInfo, why: str) -> Problem:
    return Problem("unresolved-link", f"{_shown(link)}, which cannot be read: {why}.")
