"""The code blocks of a document, and how each kind is run.

A fence of ``python`` or ``bash`` is run; ``console`` (with a ``$`` before each command) and ``text`` are not:
they need a server, a GPU, a network or hours.
"""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sample_models import ROOT
from typer.testing import CliRunner

from runtime.commands.app import app

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks_of(document: Path) -> list[Block]:
    """Every fenced block, in order."""
    text = document.read_text(encoding="utf-8")
    return [Block(m[2], m[3], text[: m.start()].count("\n") + 2) for m in _FENCE.finditer(text)]


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one a line, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def make_targets() -> list[str]:
    """Targets of the Makefile."""
    return re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def run_command(command: str) -> None:
    """Run ``babeltower …`` or ``python bench/….py …`` in this process and folder.

    Raises:
        AssertionError: it fails, or nothing here can run such a command.
    """
    words = shlex.split(command)
    if words[0] == "babeltower":
        command_app, arguments = app, words[1:]
    elif words[0] == "python" and (script := re.fullmatch(r"bench/(\w+)\.py", words[1])):
        command_app, arguments = importlib.import_module(f"bench.{script[1]}").app, words[2:]
    else:
        raise AssertionError(f"No test can run {command!r}; write it as a console block.")
    result = CliRunner().invoke(command_app, arguments)
    assert result.exit_code == 0, (command, result.output, result.exception)


def run_python(block: Block, document: Path, names: dict[str, Any]) -> None:
    """Run a block of Python; tracebacks show the document's line."""
    exec(compile("\n" * (block.line - 1) + block.text, str(document), "exec"), names)
