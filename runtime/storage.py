"""Atomic file writes: write a temporary file, sync it, rename it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import CorpusError

__all__ = ["beside", "sync_folder", "write_atomically"]


def beside(path: Path) -> Path:
    """Return the temporary path of a file being written; a resumed run overwrites it."""
    return path.with_name(f".{path.name}.part")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> int:
    """Write a temporary file, sync it, rename it, and sync the folder.

    Args:
        write: Function that writes the file at a given path.

    Returns:
        Size of the file in bytes.

    Raises:
        CorpusError: the disk is full or not writable; no file is left behind.
    """
    unfinished = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        n_bytes = unfinished.stat().st_size
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CorpusError(
            f"{path} cannot be written: {error}. Free disk space or fix the disk, and run the same command "
            "again to resume with this part."
        ) from error
    return n_bytes


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
