"""Start of a server on whatever a killed command left in its repository."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from runtime.errors import BabeltowerError, ManifestError, RepositoryInUseError
from runtime.repository import has_leftovers, staging
from runtime.repository_lock import holder_of_lock
from runtime.transaction import ChangeJournal, LiveModels, journals_of_repository, settled

__all__ = ["recover_before_start", "recover_files", "while_changed"]

_CHANGE_S = 60.0
"""Longest time to wait until a repository's files agree while a command changes it."""


def recover_before_start(repository: Path, say: Callable[[str], None]) -> None:
    """Finish or undo what a killed command left, so that the last whole version is served, and say so.

    A change that another process is making is left to it: its files are whole at every moment.

    Raises:
        ManifestError: a journal is damaged, or files that it names are gone.
    """
    if recover_files(repository, say):
        with contextlib.suppress(RepositoryInUseError), staging(repository, "serve") as stage:
            for journal in _journals(repository):
                settled(repository, stage, journal)  # a server that starts now loads the files as they are


def recover_files(repository: Path, say: Callable[[str], None]) -> bool:
    """Carry out the journals of killed commands, and remove what else they left.

    Returns:
        True if a running server has models to load or unload, which ``settle`` makes it do.

    Raises:
        ManifestError: a journal is damaged, or files that it names are gone.
    """
    journals = _journals(repository)
    unfinished = [journal for journal in journals if not journal.done]
    if holder_of_lock(repository) is not None:
        return False
    if unfinished or has_leftovers(repository):
        try:
            with staging(repository, "serve"):  # recovers
                pass
        except ManifestError:
            raise
        except BabeltowerError as error:
            for journal in unfinished:
                say(f"The {journal.work} of {journal.name} was interrupted, and cannot be ended: {error}")
            return False
    return any(journal.live != LiveModels() for journal in _journals(repository))


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


def _journals(repository: Path) -> list[ChangeJournal]:
    return list(journals_of_repository(repository))
