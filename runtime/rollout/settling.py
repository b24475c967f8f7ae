"""Bring a running server in line with its repository after a rollout, also an interrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from runtime.errors import BabeltowerError
from runtime.rollout.control import Control
from runtime.transaction import ChangeJournal, journals_of_repository, settled
from runtime.triton_config import config_of_folder

__all__ = ["Say", "settle", "tell_server"]

Say: TypeAlias = Callable[[str], None]


def settle(repository: Path, stage: Path, control: Control, say: Say) -> list[ChangeJournal]:
    """Make a server load what interrupted rollouts left to be loaded; the files are in order already.

    The caller holds the repository's lock, and ``stage`` is its stage.

    Returns:
        Journals of interrupted or failed rollouts; those that are over are gone afterwards.

    Raises:
        ServerError: the server cannot be reached, or does not load a model.
    """
    journals = list(journals_of_repository(repository))
    for journal in journals:
        if journal.live.load or journal.live.unload:
            say(f"{journal} The server is brought in line with its files")
            _tell(repository, stage, journal, control)
    return journals


def tell_server(repository: Path, stage: Path, journal: ChangeJournal, control: Control, say: Say) -> None:
    """Make a server load and unload the models of a journal; say what fails, for the next command to do."""
    try:
        _tell(repository, stage, journal, control)
    except BabeltowerError as error:
        say(
            f"the server is not in line with its files yet: {error} The next rollout brings it in line, and "
            "`babeltower serve --control` does so while it runs or when it starts."
        )


def _tell(repository: Path, stage: Path, journal: ChangeJournal, control: Control) -> None:
    for name in journal.live.load:
        control.load(config_of_folder(repository / name))
    for name in journal.live.unload:
        control.unload(name)
    settled(repository, stage, journal)
