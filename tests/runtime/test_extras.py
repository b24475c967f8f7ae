"""A package that is missing is named, with the extra that brings it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tomllib
from sample_models import ROOT
from typer.testing import CliRunner

from runtime.commands.app import COMMANDS, app
from runtime.errors import EngineError, MissingPackageError
from runtime.extras import _EXTRA_OF, import_optional, install_hint, needing


def test_a_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(MissingPackageError) as caught:
        import_optional("nothing.inside", "A test", "babeltower[index]", remedy="or go on without.")
    assert str(caught.value) == (
        "A test needs nothing, which is not installed. Run: pip install 'babeltower[index]' or go on without."
    )
    assert isinstance(caught.value, EngineError)


def test_a_package_that_cannot_be_loaded_says_why() -> None:
    expected = r"cannot be loaded \(libcuda is too old\)"
    with pytest.raises(MissingPackageError, match=expected), needing("A", "b"):
        raise ImportError("libcuda is too old", name="b")


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(_EXTRA_OF.values())
    for folder in ("runtime", "export", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"babeltower\[(\w+)\]", path.read_text()))
    assert named <= set(extras)
    assert install_hint("faiss") == "Run: pip install 'babeltower[index]'"
    assert install_hint("scipy") == "Run: pip install 'scipy'"
    assert install_hint("PIL") == "Run: pip install 'pillow'"


@pytest.mark.parametrize("command", [entry.name for entry in COMMANDS])
def test_a_command_without_its_package_ends_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = next(entry for entry in COMMANDS if entry.name == command)

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("runtime.commands.app.import_module", missing)
    done = CliRunner().invoke(app, [entry.name, str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.strip() == (
        "error: This command needs torch, which is not installed. Run: pip install 'babeltower[export]'"
    )


def test_help_imports_no_command() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['babeltower', '--help']\n"
        "from runtime.commands.app import COMMANDS, main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = [entry.module for entry in COMMANDS if entry.module in sys.modules]\n"
        "assert not loaded and 'numpy' not in sys.modules, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for entry in COMMANDS:
        assert entry.name in done.stdout
        assert entry.panel in done.stdout
