"""Changes of a repository that are killed at every step, and the lock that lets one command make them."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import runtime
from runtime.errors import ExportError, ManifestError, RepositoryInUseError
from runtime.repository import commit, staging
from runtime.repository_lock import LOCK_FILE, holder_of_lock, repository_lock
from runtime.server.recovery import recover_files
from runtime.storage import copy_folder
from runtime.transaction import (
    ChangeJournal,
    FileChange,
    LiveModels,
    WorkOutcome,
    carried_out,
    journals_of_repository,
    write_journal,
)

PACKAGE = Path(runtime.__file__).parent


def killed(work: Callable[[], object]) -> int:
    """Run a function in a process of its own, which may kill itself; return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die_at(step: int, when: str) -> None:
    """Kill this process before or after its ``step``-th rename."""
    numbers = itertools.count(1)

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: object, **keywords: object) -> None:
            number = next(numbers)
            if number == step and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments, **keywords)
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return rename

    os.rename, os.replace = dying(os.rename), dying(os.replace)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return whole_repository(tmp_path)


def whole_repository(folder: Path) -> Path:
    """A model's two folders and its manifest, all of release 1."""
    repository = folder / "models"
    for name in ("m_text", "m_image"):
        (repository / name).mkdir(parents=True)
        (repository / name / "release").write_text("1")
    (repository / "m.json").write_text("1")
    return repository


def releases(repository: Path) -> list[str]:
    paths = ("m_text/release", "m_image/release", "m.json")
    return [(repository / path).read_text() for path in paths]


def change_to_2(repository: Path) -> None:
    with staging(repository, "frontends") as stage:
        for name in ("m_text", "m_image"):
            (stage / name).mkdir()
            (stage / name / "release").write_text("2")
        (stage / "draft").write_text("2")
        moves = {stage / name: repository / name for name in ("m_text", "m_image")}
        commit(stage, repository, "m", "test", {**moves, stage / "draft": repository / "m.json"})


def hidden(repository: Path) -> list[str]:
    return [p.name for folder in (repository, repository.parent) for p in folder.glob(".*")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_change_killed_at_any_rename_is_whole_after_the_next_command(
    step: int, when: str, repository: Path
) -> None:
    def work() -> None:
        die_at(step, when)
        change_to_2(repository)

    ended_by = killed(work)
    with staging(repository, "export"):
        found = releases(repository)
        assert found in (["1"] * 3, ["2"] * 3)
        assert found == ["2"] * 3 or (step, when) == (1, "before")
    assert ended_by in (signal.SIGKILL, 0)
    assert not hidden(repository)
    assert not list(journals_of_repository(repository))


def interrupt_at(line: int) -> None:
    """Interrupt this process, as a signal interrupts a command, at its ``line``-th line in `runtime`."""
    numbers = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        if event == "line" and next(numbers) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)


def test_a_change_interrupted_at_any_line_leaves_nothing_for_long(tmp_path: Path) -> None:
    """The lock is free, the change is whole, and a server that looks removes the stage and says nothing."""
    for line in itertools.count(1):
        repository = whole_repository(tmp_path / str(line))

        def work(line: int = line, repository: Path = repository) -> None:
            interrupt_at(line)
            change_to_2(repository)

        ended_by = killed(work)
        assert holder_of_lock(repository) is None
        recover_files(repository, lambda _: None)
        assert releases(repository) in (["1"] * 3, ["2"] * 3)
        assert not hidden(repository)
        assert not list(journals_of_repository(repository))
        if ended_by == 0:
            break
    assert line > 200  # else it was not traced


def test_every_step_of_a_change_was_tried(repository: Path) -> None:
    def work() -> None:
        die_at(9, "before")
        change_to_2(repository)

    assert killed(work) == 0


def test_work_that_was_not_decided_is_undone(repository: Path) -> None:
    def work() -> None:
        with staging(repository, "rollout") as stage:
            (stage / "back").write_text("1")
            moves = ((os.path.relpath(stage / "back", repository), "m.json"),)
            undo = FileChange(remove=("m_text/2", "m_new"), moves=moves)
            live = LiveModels(load=("m_text",))
            write_journal(
                repository, stage, ChangeJournal("m", "rollout to version 2", WorkOutcome.UNDONE, undo, live)
            )
            (repository / "m_text" / "2").mkdir()
            (repository / "m_new").mkdir()
            (repository / "m.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(work) == signal.SIGKILL
    with staging(repository, "export"):
        assert releases(repository) == ["1"] * 3
        assert not (repository / "m_new").exists()
        assert not (repository / "m_text" / "2").exists()
        (journal,) = journals_of_repository(repository)
        assert journal.done
        assert journal.live.load == ("m_text",)  # for whoever reaches the server


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", ""])
def test_a_journal_touches_nothing_outside_its_repository(path: str, repository: Path) -> None:
    journal = ChangeJournal("m", "test", WorkOutcome.UNDONE, FileChange(remove=(path,)))
    with pytest.raises(ManifestError, match="outside"):
        carried_out(repository, repository.parent, journal)


@pytest.mark.parametrize("text", ["", "{}", '{"name": 1}', "[" * 100_000])
def test_a_damaged_journal_is_said(text: str, repository: Path) -> None:
    (repository / "m.journal.json").write_text(text)
    with pytest.raises(ManifestError, match=r"m\.journal\.json"), staging(repository, "export"):
        pass
    assert not hidden(repository)


def test_the_second_command_is_told_who_holds_the_lock(repository: Path) -> None:
    with staging(repository, "rollout"):
        assert "babeltower rollout" in str(holder_of_lock(repository))
        refusals: list[Exception] = []

        def other() -> None:
            try:
                with staging(repository, "export"):
                    pass
            except RepositoryInUseError as error:
                refusals.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"`babeltower rollout`, process {os.getpid()} on " in str(refusals[0])
        with staging(repository, "frontends"):  # part of this command
            pass
    assert holder_of_lock(repository) is None
    with staging(repository, "export"):
        pass


def test_a_killed_command_holds_no_lock(repository: Path) -> None:
    def work() -> None:
        with repository_lock(repository, "export"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(work) == signal.SIGKILL
    assert (repository / LOCK_FILE).exists()
    assert holder_of_lock(repository) is None
    with repository_lock(repository, "export") as is_outermost:
        assert is_outermost


def test_what_killed_commands_left_unfinished_is_removed(repository: Path) -> None:
    (repository / ".m.json.17.0a1b2c3d.part").write_text("half")
    (repository / "m_text" / ".2.17.part").mkdir()
    (repository / "m_text" / ".2.17.part" / "model.onnx").write_text("half")
    (repository.parent / ".models.staging-x").mkdir()
    (repository / ".git").mkdir()
    with staging(repository, "export"):
        pass
    assert hidden(repository) == [".git"]
    assert not (repository / "m_text" / ".2.17.part").exists()


def test_bytecode_of_what_was_removed_meanwhile_does_not_stay(repository: Path) -> None:
    """A server's Python model writes it into folders that it is just loading, and makes them anew."""

    def write(folder: str) -> None:
        (repository / folder / "__pycache__").mkdir(parents=True, exist_ok=True)
        (repository / folder / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"x")

    for folder in ("m_text/1", "m_text/2", "m_image", "other"):
        write(folder)
    (repository / "m_text" / "1" / "model.py").write_text("")
    with staging(repository, "rollout"):
        for folder in ("m_candidate_text/3/runtime", "m_candidate_image/3", "m_text/3/runtime/preprocessing"):
            write(folder)
    assert sorted(path.name for path in repository.iterdir()) == ["m.json", "m_image", "m_text", "other"]
    assert sorted(path.name for path in (repository / "m_text").iterdir()) == ["1", "release"]
    assert not hidden(repository)


def test_a_full_disk_leaves_no_half_folder(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "model.onnx").write_bytes(bytes(1_000_000))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            copy_folder(tmp_path / "origin", tmp_path / "copy")

    assert killed(work) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_a_full_disk_is_an_error_that_says_so(repository: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(ExportError, match="bytes free"), staging(repository, "export") as stage:
            (stage / "model.onnx").write_bytes(bytes(1_000_000))

    assert killed(work) == 0
    assert releases(repository) == ["1"] * 3
    assert not hidden(repository)
