"""Files and folders are complete under their name, or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.storage import copy_folder, replace_durably, replace_file, replace_text, staged_folder

Replace = Callable[[Path, Callable[[Path], object]], object]


@pytest.fixture(params=[replace_file, replace_durably])
def replace(request: pytest.FixtureRequest) -> Replace:
    return request.param


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, replace: Replace) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(unfinished: Path) -> None:
        unfinished.write_text("new")
        assert path.read_text() == "old"

    replace(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, replace: Replace) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_link_stays_a_link(tmp_path: Path, replace: Replace) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "a.json"
    link.symlink_to(target)
    for text in ("new", "newer"):  # the first time, the link's target does not exist
        replace(link, lambda unfinished, text=text: unfinished.write_text(text))
        assert link.is_symlink()
        assert target.read_text() == text
    assert names(tmp_path / "there") == ["a.json"]


def test_a_pipe_and_a_folder_are_not_replaced(tmp_path: Path, replace: Replace) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, message in (("pipe", "regular"), ("link", "regular"), ("folder", "Is a directory")):
        with pytest.raises(OSError, match=message):
            replace(tmp_path / name, lambda unfinished: unfinished.write_text("new"))
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["folder", "link", "pipe"]


def test_a_folder_does_not_replace_a_file_and_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError), staged_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.json.part").write_text("half")
    assert replace_durably(tmp_path / "a.json", lambda path: path.write_text("whole")) == 5
    assert names(tmp_path) == ["a.json"]


def test_text_is_utf_8(tmp_path: Path) -> None:
    replace_text(tmp_path / "a", "猫")
    assert (tmp_path / "a").read_bytes() == "猫".encode()


def test_a_folder_is_replaced_only_when_it_was_filled(tmp_path: Path) -> None:
    out = tmp_path / "index"
    for content in ("1", "2"):
        with staged_folder(out) as folder:
            (folder / "a").write_text(content)
        assert (out / "a").read_text() == content
    with pytest.raises(FileNotFoundError), staged_folder(out) as folder:
        (folder / "missing" / "a").write_text("3")
    with pytest.raises(ValueError, match="taken"), staged_folder(out, before_rename=refuse):
        pass
    assert (out / "a").read_text() == "2"
    assert names(tmp_path) == ["index"]


def refuse() -> None:
    raise ValueError("taken")


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".index.999999999.part", tmp_path / f".index.{os.getppid()}.part"
    for folder in (dead, alive):
        folder.mkdir()
    with staged_folder(tmp_path / "index"):
        pass
    assert names(tmp_path) == [alive.name, "index"]


def test_a_folder_is_copied_without_caches(tmp_path: Path) -> None:
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("1")
    copy_folder(tmp_path / "a", tmp_path / "b", adapt=lambda folder: (folder / "more").touch() or None)
    assert names(tmp_path / "b") == ["file", "more"]
