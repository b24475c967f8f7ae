"""Folders of servers that were killed are removed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import wait_until

from runtime.server.scratch import SHARED_MEMORY, note_regions, plain_folder, remove_left_behind

PREFIX = "babeltower-test-"
OWNER = f"""
import subprocess, sys, time
from pathlib import Path
from runtime.server.scratch import note_regions, owner_descriptor, plain_folder

with plain_folder({PREFIX!r}) as folder, owner_descriptor(folder) as descriptor:
    note_regions(folder, sys.argv[1:])
    child = subprocess.Popen(["sleep", "600"], pass_fds=(descriptor,))
    print(folder, child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def region() -> Iterator[Path]:
    path = SHARED_MEMORY / f"triton_python_backend_shm_region_{uuid.uuid4()}"
    path.write_bytes(b"a")
    yield path
    path.unlink(missing_ok=True)


def test_a_folder_is_removed_once_nobody_of_its_server_lives(
    tmp_path: Path, region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    other = tmp_path / "kept"
    other.write_text("a")
    names = [region.name, "../../" + str(other)]
    command = [sys.executable, "-c", OWNER, *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder, child = process.stdout.readline().split()
        assert Path(folder).parent == tmp_path
        assert not remove_left_behind(tmp_path, PREFIX)
        process.kill()
    assert not remove_left_behind(tmp_path, PREFIX)  # its server lives
    os.kill(int(child), 9)
    wait_until(lambda: remove_left_behind(tmp_path, PREFIX) == [Path(folder)], "it is removed")
    assert not Path(folder).exists()
    assert not region.exists()
    assert other.exists()


def test_folders_without_an_owner_are_left(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}being-made").mkdir()
    (tmp_path / f"{PREFIX}file").write_text("")
    assert not remove_left_behind(tmp_path, PREFIX)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_ours_is_removed_at_the_end() -> None:
    with plain_folder(PREFIX) as folder:
        note_regions(folder, {"a", "b"})
        assert (folder / "regions").read_text() == "a\nb"
        assert not remove_left_behind(folder.parent, folder.name)
    assert not folder.exists()
