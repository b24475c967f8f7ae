"""Changes of a repository that are made as a whole or not at all, whenever the process is killed.

New files are written to a stage first, which may fail. Then a journal, ``NAME.journal.json``, says which
renames and removals are to be made, and they are made; none of them needs space on the disk. The journal of a
killed process is carried out by the next command (``recover``), so a change that was decided is finished, and
one that was not is undone: until it is decided, the journal holds the way back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from runtime.errors import ManifestError
from runtime.storage import copy_folder, replace_file, sync_folder
from runtime.typed_json import value_from_json

__all__ = [
    "ChangeJournal",
    "FileChange",
    "LiveModels",
    "WorkOutcome",
    "carried_out",
    "is_named_by_journal",
    "journals_of_repository",
    "make_change",
    "recover",
    "remove_journal",
    "settled",
    "write_journal",
]

_SUFFIX = ".journal.json"
_FORMAT = "babeltower-journal/1"


class WorkOutcome(str, Enum):
    """WorkOutcome of a journal's work: the change that is left finishes it, or takes it back."""

    FINISHED = "finished"
    UNDONE = "undone"


@dataclass(frozen=True, slots=True)
class FileChange:
    """Folders to remove, then files and folders to rename, replacing those that are there.

    Paths are relative to the repository; those of moves start in a stage, which may lie beside it.
    """

    remove: tuple[str, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LiveModels:
    """Triton models that a running server has to load from the files, or unload, to fit the repository."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChangeJournal:
    """Change of REPOSITORY/NAME in progress.

    Attributes:
        work: The change in words: ``rollout to version 3``.
        outcome: WorkOutcome of the work once the change is made.
        done: The change is made, and at most ``live`` is left.
    """

    name: str
    work: str
    outcome: WorkOutcome
    change: FileChange
    live: LiveModels = field(default_factory=LiveModels)
    done: bool = False
    format: str = _FORMAT

    def __str__(self) -> str:
        return f"The {self.work} of {self.name} was interrupted, and is {self.outcome.value}."


def journals_of_repository(repository: Path) -> Iterator[ChangeJournal]:
    """Read the journals in a repository, by name.

    Raises:
        ManifestError: one is damaged.
    """
    for path in sorted(repository.glob(f"*{_SUFFIX}")):
        yield _read(path)


def write_journal(repository: Path, stage: Path, journal: ChangeJournal) -> None:
    """Write a model's journal, or replace it: from then on, ``recover`` carries its change out.

    It is written to ``stage`` and renamed: Triton fails to list a repository while a file in it vanishes.

    Raises:
        OSError: the disk is full, or cannot be written; the former journal is unchanged.
    """
    text = json.dumps(dataclasses.asdict(journal), indent=1, ensure_ascii=False) + "\n"
    draft = stage / f"journal-{os.urandom(4).hex()}.json"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(_path(repository, journal.name))
    sync_folder(repository)


def remove_journal(repository: Path, name: str) -> None:
    """Remove a model's journal: nothing is left to be done."""
    _path(repository, name).unlink(missing_ok=True)


def recover(repository: Path, stage: Path, tell: Callable[[ChangeJournal], None]) -> None:
    """Carry out every journal that a killed process left; the caller holds the repository's lock.

    Args:
        stage: Folder on the repository's disk for what is removed.
        tell: Called with each journal that is carried out.

    Raises:
        ManifestError: a journal is damaged, or files that it names are gone.
        OSError: the repository cannot be written.
    """
    for journal in list(journals_of_repository(repository)):
        if not journal.done:
            tell(journal)
            carried_out(repository, stage, journal)


def carried_out(repository: Path, stage: Path, journal: ChangeJournal) -> ChangeJournal:
    """Make the change of a journal, as far as it is not made, and return the journal of what is left.

    The journal stays while a running server has to load or unload models; that of work that was undone stays
    as a note of it, until the model is changed again.

    Raises:
        ManifestError: files that it names are gone.
        OSError: the repository cannot be written; the journal stays.
    """
    make_change(repository, stage, journal.change)
    left = dataclasses.replace(journal, change=FileChange(), done=True)
    if left.live == LiveModels() and left.outcome is WorkOutcome.FINISHED:
        remove_journal(repository, journal.name)
    else:
        # On a full disk the journal stays as it is; to carry it out once more does nothing.
        with contextlib.suppress(OSError):
            write_journal(repository, stage, left)
    return left


def settled(repository: Path, stage: Path, journal: ChangeJournal) -> None:
    """Record that no running server differs from the files: it was told to load them, or starts now."""
    if journal.outcome is WorkOutcome.FINISHED:
        remove_journal(repository, journal.name)
    elif journal.live != LiveModels():
        write_journal(repository, stage, dataclasses.replace(journal, live=LiveModels()))


def make_change(repository: Path, stage: Path, change: FileChange) -> None:
    """Make the removals and renames of a change that are not made yet; errors as of ``carried_out``."""
    for path in change.remove:
        _put_away(repository, _inside(repository, path), stage)
    for source, target in change.moves:
        _move(repository / source, _inside(repository, target), stage)


def is_named_by_journal(stage: Path, repository: Path) -> bool:
    """Check whether a journal that is left, even a damaged one, takes files from a stage."""
    return any(
        stage.name in path.read_text(encoding="utf-8", errors="replace")
        for path in repository.glob(f"*{_SUFFIX}")
    )


def _path(repository: Path, name: str) -> Path:
    return repository / f"{name}{_SUFFIX}"


def _read(path: Path) -> ChangeJournal:
    try:
        journal: ChangeJournal = value_from_json(
            ChangeJournal, json.loads(path.read_text(encoding="utf-8")), str(path)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path} cannot be read: {error}. It says how to finish or undo an interrupted change. If it "
            "cannot be restored, remove it, check the model with `babeltower inspect`, and export "
            "it again if that fails."
        ) from error
    if journal.format != _FORMAT or path != _path(path.parent, journal.name):
        raise ManifestError(
            f"{path} is a journal of {journal.name!r} in format {journal.format!r}; expected {_FORMAT!r}. "
            "Finish it with the babeltower that wrote it."
        )
    return journal


def _inside(repository: Path, path: str) -> Path:
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        raise ManifestError(f"A journal names {path!r}, which is outside {repository}. Remove the journal.")
    return repository / path


def _put_away(repository: Path, path: Path, stage: Path) -> None:
    """Rename a file or folder out of the repository: Triton must not meet half of a model."""
    if os.path.lexists(path):
        name = "-".join(path.relative_to(repository).parts)
        path.rename(stage / f"removed-{name}-{os.urandom(4).hex()}")


def _move(source: Path, target: Path, stage: Path) -> None:
    if not os.path.lexists(source):
        if not os.path.lexists(target):
            raise ManifestError(
                f"Neither {source} nor {target} is there, so an interrupted change cannot be finished. "
                "Export the checkpoint again."
            )
        return  # made before
    folder = source.is_dir()
    if folder and os.path.lexists(target):
        target.rename(stage / f"replaced-{target.name}-{os.urandom(4).hex()}")
    try:
        source.rename(target.resolve() if target.is_symlink() else target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        (copy_folder if folder else _copy_file)(source, target)  # behind a link, on another disk


def _copy_file(source: Path, target: Path) -> None:
    replace_file(target, lambda unfinished: shutil.copyfile(source, unfinished))
    source.unlink()
