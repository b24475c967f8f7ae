"""Files that are whole or not there: written beside, brought to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import CorpusError

__all__ = ["beside", "sync_folder", "write_atomically"]


def beside(path: Path) -> Path:
    """Where a file is written before it is whole; a run that goes on writes over it."""
    return path.with_name(f".{path.name}.part")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> int:
    """Write a file beside, sync it, rename it, sync the folder.

    Args:
        write: Writes the path that it is given.

    Returns:
        The file's size in bytes.

    Raises:
        CorpusError: the disk is full, or cannot be written; nothing is left behind.
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
            f"{path} cannot be written: {error}. Free space or mend the disk, and run the same command "
            "again: it goes on with this part."
        ) from error
    return n_bytes


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
