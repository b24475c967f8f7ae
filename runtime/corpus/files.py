"""Files of a corpus: paths, globs and URLs resolved to files of a pyarrow file system.

Local paths and the schemes that pyarrow supports itself (s3, gs, hdfs, file) need nothing else; any other
scheme (memory, http, az, …) is opened with fsspec.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.extras import import_optional

__all__ = [
    "File",
    "FileSet",
    "digest_of_files",
    "files_from_location",
    "filesystem_from_location",
    "require_utf8",
]

_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "file")
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class File:
    """One file of a corpus; ``path`` is its path in the file system."""

    path: str
    n_bytes: int

    @property
    def suffix(self) -> str:
        """Last suffix, in lower case."""
        return Path(self.path).suffix.lower()


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files of one file system, sorted by path; ``root`` is the folder they were found in."""

    filesystem: Any
    root: str
    files: tuple[File, ...]
    is_folder: bool

    def relative(self, file: File) -> str:
        """Return a file's path relative to the root."""
        return file.path.removeprefix(self.root).lstrip("/") or file.path


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

        filesystem, path = fsspec.core.url_to_fs(location)
        return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(filesystem)), path
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{location} cannot be opened: {error}.") from error


def require_utf8(location: str) -> None:
    """Check that a path is UTF-8, as it is stored with the vectors.

    Raises:
        InputError: it is not; Python shows its other bytes as lone surrogates.
    """
    try:
        location.encode()
    except UnicodeEncodeError:
        shown = location.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise InputError(
            f"The name {shown} is not UTF-8. Rename it: names are stored with the vectors, in UTF-8."
        ) from None


def _without_wildcards(location: str) -> tuple[str, str]:
    """Split a URL before its first path component with wildcards, which URLs do not allow."""
    found = _WILD.search(location)
    if found is None:
        return location, ""
    cut = location.rindex("/", 0, found.start())
    return location[:cut], location[cut:]


def files_from_location(location: str, *, keep: Callable[[str], bool] | None = None) -> FileSet:
    """List the files of a path, folder (recursively), glob or URL, sorted by path, without hidden files.

    Args:
        keep: Filter on the file names of a folder; a file named directly is always kept.

    Raises:
        InputError: the location does not exist, or a pattern matches nothing.
    """
    filesystem, path = filesystem_from_location(location)
    arrow_fs = _arrow_fs()
    try:
        if _WILD.search(path):
            return _globbed(arrow_fs, filesystem, location, path)
        info = filesystem.get_file_info([path])[0]
        if info.type == arrow_fs.FileType.File:
            return FileSet(filesystem, path.rsplit("/", 1)[0], (File(path, info.size),), False)
        if info.type == arrow_fs.FileType.Directory:
            found = _listed(arrow_fs, filesystem, path)
            return FileSet(filesystem, path, tuple(f for f in found if keep is None or keep(f.path)), True)
    except UnicodeDecodeError as error:
        name = bytes(error.object).decode("utf-8", "backslashreplace")
        raise InputError(
            f"{location} holds a file whose name is not UTF-8: {name}. Rename it: names are stored as ids."
        ) from error
    except OSError as error:
        raise InputError(f"{location} cannot be listed: {error}.") from error
    raise InputError(f"{location} does not exist. Pass a file, a folder, a glob or a URL of them.")


def _globbed(arrow_fs: Any, filesystem: Any, location: str, path: str) -> FileSet:
    from fsspec.utils import glob_translate

    base = path[: path.rindex("/", 0, _WILD.search(path).start())] or "/"  # type: ignore[union-attr]
    matches = re.compile(glob_translate(path)).match
    found = tuple(f for f in _listed(arrow_fs, filesystem, base) if matches(f.path))
    if not found:
        raise InputError(f"No file matches {location}. Quote the pattern, and check the folder {base}.")
    return FileSet(filesystem, base, found, False)


def _listed(arrow_fs: Any, filesystem: Any, folder: str) -> list[File]:
    selector = arrow_fs.FileSelector(folder, recursive=True, allow_not_found=True)
    files = [
        File(info.path, info.size)
        for info in filesystem.get_file_info(selector)
        if info.type == arrow_fs.FileType.File and not _is_hidden(info.path.removeprefix(folder))
    ]
    return sorted(files, key=lambda file: file.path)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def digest_of_files(files: Sequence[File], names: Iterable[str]) -> str:
    """Return a short hash of the files' names and sizes, in order."""
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        digest.update(f"{name}\0{file.n_bytes}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _arrow_fs() -> Any:
    return import_optional("pyarrow.fs", "A corpus", "babeltower[corpus]")
