"""Files of a corpus: paths, folders, globs, braces and URLs resolved to files of pyarrow file systems.

Local paths and the schemes that pyarrow supports itself (s3, gs, hdfs, file) need nothing else; any other
scheme (memory, http, az, …) is opened with fsspec.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.corpus.faults import FaultKind, Patience, fault_kind, without_query
from runtime.corpus.locations import (
    expanded_braces,
    first_wildcard,
    suffix_of,
    without_location_query,
)
from runtime.corpus.reading import fsspec_of, is_local
from runtime.errors import DamagedFileError, InputError, MissingSourceError
from runtime.extras import import_optional

__all__ = [
    "MISNAMED_REMEDY",
    "File",
    "FileSet",
    "digest_of_files",
    "files_from_location",
    "files_from_locations",
    "filesystem_from_location",
    "require_utf8",
    "shown_bytes",
]

MISNAMED_REMEDY = "Rename it: names are stored with the vectors, in UTF-8"

_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "file")


@dataclass(frozen=True, slots=True)
class File:
    """One file of a corpus.

    Attributes:
        path: Path in its file system.
        name: Path relative to the location it was found in: the id of an image, and the file's name in the
            record of the input.
        n_bytes: Size, or ``None`` if the storage does not tell.
        version: Modification time or ETag, as text; empty if the storage tells neither.
    """

    filesystem: Any = field(repr=False, compare=False)
    path: str
    name: str
    n_bytes: int | None
    version: str = ""

    @property
    def suffix(self) -> str:
        """Last suffix below a compression, in lower case."""
        return suffix_of(self.path)

    @property
    def shown(self) -> str:
        """Path for messages, without the query of a signed URL."""
        return without_query(self.path)

    @property
    def folder(self) -> str:
        """Path of the folder that holds the file."""
        return without_location_query(self.path).rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files of a source, in order.

    Attributes:
        is_folder: True if a folder was given; its files of other formats are left out.
        notes: What was left out while listing, in words.
        misnamed: Names, with escapes, of files whose names are not UTF-8: they cannot be stored as ids.
    """

    files: tuple[File, ...]
    is_folder: bool
    notes: tuple[str, ...] = ()
    misnamed: tuple[str, ...] = ()

    def kept(self, files: Iterable[File], *notes: str) -> FileSet:
        """Return the set with some of its files, and notes on the others."""
        return replace(self, files=tuple(files), notes=(*self.notes, *notes))


def filesystem_from_location(location: str) -> tuple[Any, str]:
    """Open the file system of a path or URL, and return it with the path inside it.

    Raises:
        InputError: the scheme's own package is not installed, or the URL is malformed.
        MissingPackageError: pyarrow is not installed.
    """
    require_utf8(location)
    arrow_fs = _arrow_fs()
    scheme = location.split("://", 1)[0] if "://" in location else None
    try:
        if scheme is None:
            return arrow_fs.LocalFileSystem(), str(Path(location).absolute())
        if scheme in _ARROW_SCHEMES:
            clean, wild = _without_wildcards(location)
            filesystem, path = arrow_fs.FileSystem.from_uri(clean)
            return filesystem, path.rstrip("/") + wild
        import fsspec

        if scheme in ("http", "https"):  # fsspec would split an address at ::, which IPv6 has
            parts = urlsplit(location)
            if not parts.hostname or (parts.port or 1) < 0:
                raise ValueError("it names no host")
            filesystem, path = fsspec.filesystem(scheme), location
        else:
            filesystem, path = fsspec.core.url_to_fs(location)
        return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(filesystem)), path
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{without_query(location)} cannot be opened: {error}.") from error


def require_utf8(location: str) -> None:
    """Check that a path is UTF-8, as it is stored with the vectors.

    Raises:
        InputError: it is not; Python shows its other bytes as lone surrogates.
    """
    try:
        location.encode()
    except UnicodeEncodeError:
        raise InputError(f"The name {shown_bytes(location)} is not UTF-8. {MISNAMED_REMEDY}.") from None


def shown_bytes(name: str) -> str:
    """Return a name with escapes in place of the bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _without_wildcards(location: str) -> tuple[str, str]:
    """Split a URL before its first path component with wildcards, which URLs do not allow."""
    found = first_wildcard(location)
    if found is None:
        return location, ""
    cut = location.rindex("/", 0, found)
    return location[:cut], location[cut:]


def files_from_locations(
    locations: Sequence[str],
    *,
    keep: Callable[[str], bool] | None = None,
    exclude: str | None = None,
    patience: Patience | None = None,
) -> FileSet:
    """List the files of several locations, in their order; see ``files_from_location``.

    With several locations, a file's name begins with its location.
    """
    expanded = [name for location in locations for name in _expanded(location)]
    found = [files_from_location(name, keep=keep, exclude=exclude, patience=patience) for name in expanded]
    if len(found) == 1:
        return found[0]
    files = []
    for location, part in zip(expanded, found, strict=True):
        prefix = without_location_query(location).rstrip("/")
        for file in part.files:
            own = prefix if len(part.files) == 1 and prefix.endswith(file.name) else f"{prefix}/{file.name}"
            files.append(replace(file, name=own))
    twice = [path for path, n in Counter((_kind_of_store(f), f.path) for f in files).items() if n > 1]
    if twice:
        raise InputError(
            f"{without_query(twice[0][1])} is named by more than one source, and its rows would be embedded "
            f"more than once ({len(twice)} such files). Name each file once."
        )
    notes = tuple(note for part in found for note in part.notes)
    misnamed = tuple(name for part in found for name in part.misnamed)
    return FileSet(tuple(files), any(part.is_folder for part in found), notes, misnamed)


def _kind_of_store(file: File) -> str:
    """Return the type of a file's file system."""
    return str(file.filesystem.type_name)


def _expanded(location: str) -> list[str]:
    if "://" not in location and os.path.lexists(location):
        return [location]
    return expanded_braces(location)


def files_from_location(
    location: str,
    *,
    keep: Callable[[str], bool] | None = None,
    exclude: str | None = None,
    patience: Patience | None = None,
) -> FileSet:
    """List the files of a path, folder (recursively), glob or URL, sorted by path, without hidden files.

    A link to a folder is followed, unless the folder holds the link itself.

    Args:
        keep: Filter on the file names of a folder; a file named directly is always kept.
        exclude: Local folder that is not listed, such as the output's.
        patience: Repetition of failed requests.

    Raises:
        MissingSourceError: the location does not exist, or a pattern matches nothing.
        InputError: it cannot be listed.
        DamagedFileError: its storage names a file otherwise than in UTF-8.
        InputFaultError: its storage did not answer in time.
    """
    filesystem, path = filesystem_from_location(location)
    patience = patience or Patience()
    listing = _Listing(filesystem, exclude)
    shown = without_query(location)
    is_pattern = first_wildcard(location) is not None and not (is_local(filesystem) and os.path.lexists(path))
    try:
        if is_pattern:
            return patience.call(shown, lambda: _globbed(listing, shown, path))
        kind, file = patience.call(shown, lambda: listing.kind_of(path))
        if kind == "file":
            return FileSet((file,), False)
        if kind == "folder":
            found = patience.call(shown, lambda: listing.below(path))
            kept = [f for f in found if keep is None or keep(f.path)]
            misnamed = tuple(shown_bytes(n) for p, n in listing.misnamed if keep is None or keep(p))
            return FileSet(tuple(kept), True, tuple(listing.notes), misnamed)
    except UnicodeDecodeError as error:
        name = bytes(error.object).decode("utf-8", "backslashreplace")
        raise DamagedFileError(
            f"{shown} holds a file whose name is not UTF-8: {name}. {MISNAMED_REMEDY}."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if fault_kind(error) is not FaultKind.ABSENT:
            raise InputError(f"{shown} cannot be listed: {error}.") from error
    raise MissingSourceError(f"{shown} does not exist. Pass a file, a folder, a glob or a URL of them.")


def _globbed(listing: _Listing, location: str, path: str) -> FileSet:
    from fsspec.utils import glob_translate

    wild = re.search(r"[*?\[]", path)
    base = path[: path.rindex("/", 0, wild.start())] if wild else path
    matches = re.compile(glob_translate(path)).match
    depth = None if "**" in path else path.removeprefix(base).count("/")
    found = [file for file in listing.below(base or "/", depth) if matches(file.path)]
    misnamed = tuple(shown_bytes(n) for p, n in listing.misnamed if matches(p))
    if not found and not misnamed:
        raise MissingSourceError(
            f"No file matches {location}. Quote the pattern, and check the folder {base or '/'}."
        )
    return FileSet(tuple(found), False, tuple(listing.notes), misnamed)


class _Listing:
    """Listing of one file system, with sizes and versions."""

    def __init__(self, filesystem: Any, exclude: str | None) -> None:
        self._filesystem = filesystem
        self._fsspec = fsspec_of(filesystem)
        self._exclude = None if exclude is None else _identity_of_folder(exclude)
        self.notes: list[str] = []
        self.misnamed: list[tuple[str, str]] = []

    def kind_of(self, path: str) -> tuple[str, File]:
        """Return ``file``, ``folder`` or ``other``, and the file."""
        name = without_location_query(path).rstrip("/").rpartition("/")[2]
        if is_local(self._filesystem):
            found = Path(path).stat()
            is_folder = stat.S_ISDIR(found.st_mode)
            kind = "folder" if is_folder else "file" if stat.S_ISREG(found.st_mode) else "other"
            if kind == "other":
                raise InputError(
                    f"{path} is neither a file nor a folder. Pass - to read lines from standard input."
                )
            return kind, File(self._filesystem, path, name, found.st_size, f"mtime {found.st_mtime_ns}")
        if self._fsspec is not None:
            info = self._fsspec.info(path)
            kind = "folder" if info.get("type") == "directory" else "file"
            return kind, File(self._filesystem, path, name, info.get("size"), _version_of_info(info))
        arrow_fs = _arrow_fs()
        found = self._filesystem.get_file_info([path])[0]
        if found.type == arrow_fs.FileType.NotFound:
            raise FileNotFoundError(path)
        kind = "folder" if found.type == arrow_fs.FileType.Directory else "file"
        return kind, self._file_of_arrow(found, name)

    def below(self, folder: str, depth: int | None = None) -> list[File]:
        """Return all files below a folder, sorted by path, without hidden ones.

        Args:
            depth: Names below the folder after which a local folder is not looked into.
        """
        self.notes, self.misnamed = [], []
        if is_local(self._filesystem):
            files = list(self._walked(folder, depth))
        elif self._fsspec is not None:
            root = folder.rstrip("/")
            files = [
                File(self._filesystem, path, _below(path, root), info.get("size"), _version_of_info(info))
                for path, info in self._fsspec.find(folder, detail=True).items()
            ]
        else:
            arrow_fs = _arrow_fs()
            selector = arrow_fs.FileSelector(folder, recursive=True, allow_not_found=True)
            files = [
                self._file_of_arrow(info, _below(info.path, folder))
                for info in self._filesystem.get_file_info(selector)
                if info.type == arrow_fs.FileType.File
            ]
        hidden = [file for file in files if _is_hidden(file.name)]
        if hidden:
            files = [file for file in files if not _is_hidden(file.name)]
        return sorted(files, key=lambda file: file.path)

    def _file_of_arrow(self, info: Any, name: str) -> File:
        version = "" if info.mtime_ns is None else f"mtime {info.mtime_ns}"
        return File(self._filesystem, info.path, name, info.size, version)

    def _walked(self, root: str, depth: int | None) -> Iterator[File]:
        """Walk a local folder; a link to a folder that is being walked, and the excluded folder, are left."""
        if not Path(root).is_dir():
            return
        waiting = [(root, frozenset({_identity_of_folder(root)}))]
        circular = special = 0
        broken: list[str] = []
        while waiting:
            folder, above = waiting.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        is_folder, found = entry.is_dir(), entry.stat()
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.ELOOP):
                            raise
                        broken.append(entry.path)
                        continue
                    if is_folder:
                        own = (found.st_dev, found.st_ino)
                        if own == self._exclude:
                            self.notes.append(f"{entry.path} is the output folder and was left out")
                        elif own in above:
                            circular += 1
                        elif depth is None or len(above) < depth:
                            waiting.append((entry.path, above | {own}))
                    elif not stat.S_ISREG(found.st_mode):
                        special += 1
                    else:
                        name = _below(entry.path, root)
                        if not _is_utf8(name):
                            self.misnamed.append((entry.path, name))
                            continue
                        yield File(
                            self._filesystem, entry.path, name, found.st_size, f"mtime {found.st_mtime_ns}"
                        )
        if circular:
            self.notes.append(f"{circular} links lead to a folder that holds them and were not followed")
        if broken:
            self.notes.append(f"{len(broken)} links lead nowhere and were left out, such as {broken[0]}")
        if special:
            self.notes.append(f"{special} pipes, sockets or devices were left out")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity_of_folder(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _version_of_info(info: Any) -> str:
    """Return the ETag or modification time that an fsspec file system tells."""
    for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "md5", "content_hash", "created"):
        value = info.get(name)
        if value:
            return f"{name.lower()} {value}"
    return ""


def _below(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/") or path


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def digest_of_files(files: Sequence[File]) -> str:
    """Return a short hash of the files' names and sizes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.n_bytes}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _arrow_fs() -> Any:
    return import_optional("pyarrow.fs", "A corpus", "babeltower[corpus]")
