"""Durable writes of a run's files, with the error that a user of a corpus needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import CorpusError
from runtime.storage import replace_durably

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> int:
    """Write a file beside its place, sync and rename it.

    Args:
        write: Writes the path that it is given.

    Returns:
        The file's size in bytes.

    Raises:
        CorpusError: the disk is full, or cannot be written; nothing is left behind.
    """
    try:
        return replace_durably(path, write)
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be written: {error}. Free space or mend the disk, and run the same command "
            "again: it goes on with this part."
        ) from error
