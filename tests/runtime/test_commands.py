"""The command line as a process: output that cannot be written, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.commands import app as commands
from runtime.commands.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "babeltower", *arguments]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["embed", "--help"], ["languages"]])
def test_an_output_that_is_full_is_one_line(arguments: list[str]) -> None:
    with FULL.open("wb") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: The output cannot be written: No space left on device.\n"


def test_a_pipe_that_is_closed_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("languages", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_an_interrupted_command_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def interrupted(self: object) -> object:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(commands._DeferredCommand, "loaded", interrupted)
    try:
        result = CliRunner().invoke(app, [name])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    more = "; run the same command again to resume" if name == "embed" else ""
    assert result.output == f"interrupted{more}\n"


def test_an_interruption_before_a_command_is_one_line() -> None:
    program = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from runtime.commands.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_name_that_is_not_utf_8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands._DeferredCommand, "loaded", lambda self: "o\udcff".encode())
    result = CliRunner().invoke(app, ["languages"])
    assert result.exit_code == 1
    assert result.output == "error: The name or text 'o\\\\xff' is not UTF-8. Rename the file.\n"


def test_a_file_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object) -> object:
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr(commands._DeferredCommand, "loaded", failing)
    result = CliRunner().invoke(app, ["languages"])
    assert (result.exit_code, result.output) == (1, "error: [Errno 13] Permission denied: '/there'\n")
