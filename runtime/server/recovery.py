"""Start of a server on whatever a killed command left in its repository."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from runtime.errors import BabeltowerError, ManifestError
from runtime.repository import staging
from runtime.repository_lock import holder_of_lock
from runtime.transaction import Journal, journals_of_repository, settled

__all__ = ["recover_before_start", "recover_files", "while_changed"]

_CHANGE_S = 60.0
"""Longest time to wait until a repository's files agree while a command changes it."""


def recover_before_start(repository: Path, say: Callable[[str], None]) -> None:
    """Finish or undo what a killed command left, so that the last whole version is served, and say so.

    A change that another process is making is left to it: its files are whole at every moment.

    Raises:
        ManifestError: a journal is damaged, or files that it names are gone.
    """
    recover_files(repository, say)
    if holder_of_lock(repository) is None:
        for journal in _journals(repository):
            if journal.done:  # a server that starts now loads the files as they are
                with contextlib.suppress(OSError):
                    settled(repository, journal)


def recover_files(repository: Path, say: Callable[[str], None]) -> bool:
    """Carry out the journals of killed commands, and return true if there were any.

    Raises:
        ManifestError: a journal is damaged, or files that it names are gone.
    """
    open_ones = [journal for journal in _journals(repository) if not journal.done]
    if not open_ones:
        return False
    holder = holder_of_lock(repository)
    if holder is not None:
        return False
    try:
        with staging(repository, "serve"):  # recovers
            pass
    except ManifestError:
        raise
    except BabeltowerError as error:
        for journal in open_ones:
            say(f"The {journal.work} of {journal.name} was interrupted, and cannot be ended here: {error}")
        return False
    return True


def while_changed(repository: Path, check: Callable[[], None]) -> None:
    """Run a check of a repository's files, again while another command is just changing them.

    Raises:
        ManifestError: the check fails, and nobody changes the repository.
    """
    give_up_at = time.monotonic() + _CHANGE_S
    while True:
        try:
            check()
        except ManifestError:
            if holder_of_lock(repository) is None or time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)
        else:
            return


def _journals(repository: Path) -> list[Journal]:
    return list(journals_of_repository(repository))
