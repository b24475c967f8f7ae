"""Storage: files and folders that are complete under their name, or absent.

Everything is written beside its place and renamed into it, so that a reader never meets half a file, and a
killed process or a full disk leaves what was there before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from runtime.logs import LOGGER

__all__ = [
    "GIT_LFS_POINTER",
    "copy_folder",
    "create_file",
    "remove_unfinished",
    "replace_durably",
    "replace_file",
    "replace_text",
    "restore_replaced",
    "sha256_of_file",
    "staged_folder",
    "sync_folder",
]

GIT_LFS_POINTER = b"version https://git-lfs"
"""Beginning of the file that stands for one that Git LFS has not fetched."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then rename it; safe where several processes write the same file.

    Args:
        path: The file; its folder must exist.
        write: Writes the path that it is given.

    Raises:
        OSError: the disk is full, or cannot be written, or ``path`` is a folder or a device; it is unchanged,
            and nothing is left behind.
    """
    path = _replaceable(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write UTF-8 text as ``replace_file`` writes a file; errors as there."""
    replace_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def replace_durably(path: Path, write: Callable[[Path], Any]) -> int:
    """Write a file beside its place, sync it, rename it, sync the folder: it survives a loss of power.

    For a folder that one process alone writes to: the unfinished file has a fixed name, ``.NAME.part``, so
    that what a killed process left there is overwritten by the next one.

    Returns:
        Size of the file in bytes.

    Raises:
        OSError: the disk is full, or cannot be written, or ``path`` is a folder or a device; nothing is left
            behind.
    """
    path = _replaceable(path)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        _sync(unfinished)
        n_bytes = unfinished.stat().st_size
        unfinished.replace(path)
        _sync(path.parent)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return n_bytes


def create_file(path: Path, write: Callable[[Path], Any], *, durably: bool = True) -> None:
    """Write a file beside its place, then give it its name unless another process was first.

    Of several processes that create the same file, exactly one succeeds, and none sees half a file. On a
    file system without hard links the last step is a check and a rename, and a warning says so.

    Args:
        write: Writes the path that it is given.
        durably: Sync the file and its folder, so that it survives a loss of power.

    Raises:
        FileExistsError: the file exists; it is unchanged.
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        write(unfinished)
        if durably:
            _sync(unfinished)
        _name_once(unfinished, path)
        if durably:
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _name_once(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _warn_once(
            str(path.parent),
            "has no hard links; two processes that start one file in the same instant are not told apart",
        )
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        unfinished.rename(path)


@contextlib.contextmanager
def staged_folder(out: Path, *, before_rename: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a folder to fill that replaces ``out`` when the block succeeds, and is removed otherwise.

    What a killed process left beside ``out`` is removed first; the folder that it was replacing is put back.
    Where the system can exchange two names in one step, ``out`` is never missing.

    Args:
        before_rename: Called once the folder is filled; an error that it raises keeps ``out`` as it is.

    Raises:
        OSError: the disk is full, or cannot be written, or ``out`` is not a folder.
    """
    out = out.resolve() if out.is_symlink() else out
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(out)
    _remove_leftovers(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
        before_rename()
        if not out.exists():
            folder.rename(out)
        elif not _exchanged(folder, out):
            replaced = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(replaced)
            try:
                folder.rename(out)
            except OSError:
                replaced.rename(out)
                raise
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def restore_replaced(out: Path) -> None:
    """Put back a folder whose replacement was killed after it was moved away and before the new one came."""
    if out.exists() or not out.parent.is_dir():
        return
    name = re.compile(re.escape(f".{out.name}.") + r"(\d+)\.old")
    for path in sorted(out.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            path.rename(out)
            return


def copy_folder(origin: Path, target: Path, adapt: Callable[[Path], None] = lambda _: None) -> None:
    """Copy a folder beside its place, then rename it; Python's caches are left out.

    Args:
        adapt: Changes the copy before it is renamed.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(origin, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
        adapt(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder; the caller is its only writer."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


_UNFINISHED = re.compile(r"\..+?(\.\d+)?(\.[0-9a-f]{8})?\.part")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _replaceable(path: Path) -> Path:
    """Return the file to replace: the target of a symbolic link, so that the link stays one.

    Raises:
        OSError: it is a folder, or no regular file: a rename would replace a device or a pipe by a file.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path


_NOT_SUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK, errno.EISDIR}
)
"""Answers of file systems that lack an operation; a failing disk answers otherwise."""


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, as far as its file system can."""
    _sync(folder)


def _sync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk; warn where the file system cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        if not path.is_dir():
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        kind = "folders" if path.is_dir() else "files"
        _warn_once(
            str(path if path.is_dir() else path.parent),
            f"cannot sync {kind} ({error.strerror}); what was written last may be lost if the power fails",
        )
    finally:
        os.close(descriptor)


@cache
def _warn_once(folder: str, what: str) -> None:
    LOGGER.warning("the file system of %s %s", folder, what)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _remove_leftovers(out: Path) -> None:
    name = re.compile(re.escape(f".{out.name}.") + r"(\d+)\.(?:part|old)")
    for path in out.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
