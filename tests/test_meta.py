"""The project against its own promises: light imports, a clean wheel, honest help and README."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from document_blocks import blocks_of, commands_of, make_targets, run_command, run_python
from sample_models import CHECKPOINTS, ROOT, Exported
from typer.testing import CliRunner

from runtime.commands.app import COMMANDS, app
from samples import dataset

PACKAGES = ("runtime", "export", "bench", "samples")  # what a server alone imports is left out
LOADED_BY_TRITON = {"bench.serving.constant_model"}
HEAVY = ("torch", "transformers", "onnx", "open_clip", "timm", "peft", "onnxruntime", "openvino")
README = ROOT / "README.md"


def modules() -> list[str]:
    found = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        found += [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return sorted(set(found) - LOADED_BY_TRITON)


def fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", modules())
def test_all_names_what_is_there(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public)


def test_every_error_can_be_imported_from_the_top() -> None:
    import babeltower
    from runtime import errors

    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert kinds == set(errors.__all__)
    assert kinds <= set(babeltower.__all__)
    for name in babeltower.__all__:
        assert getattr(babeltower, name) is not None


@pytest.mark.parametrize("module", ["runtime", "export", "export.commands.export"])
def test_imports_are_light(module: str) -> None:
    code = f"import {module}, sys, time, json; print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    seconds, loaded = json.loads(fresh_python(code))
    assert seconds < 1.0
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("command", [*([entry.name] for entry in COMMANDS), []])
def test_help_tells_what_a_command_takes(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    if command == ["export"]:
        for option in ("--name", "--precision", "--json", "CHECKPOINT", "REPOSITORY"):
            assert option in result.stdout


def readme_commands() -> list[str]:
    return [c for block in blocks_of(README) if block.language == "bash" for c in commands_of(block)]


def test_readme_targets_exist() -> None:
    named = [shlex.split(c)[1] for c in readme_commands() if c.startswith("make ")]
    assert named[:2] == ["demo", "test"]
    assert set(named) <= set(make_targets())


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    commands = [c for c in readme_commands() if c.startswith("babeltower ") and " serve " not in c]
    assert len(commands) >= 8
    for command in commands:
        run_command(command)
    assert (tmp_path / "page.html").is_file()


def test_readme_python_runs(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in blocks_of(README) if block.language == "python"]
    assert blocks
    monkeypatch.chdir(ROOT)
    for block in blocks:
        code = block.text.replace("models/nllb-clip", str(exported("nllb-clip")))
        run_python(dataclasses.replace(block, text=code), README, {})


def test_no_trace_of_a_machine() -> None:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    forbidden = re.compile(r"/work/|/root/|registry\.npmjs|pypi\.org|files\.pythonhosted")
    suffixes = {".py", ".md", ".toml", ".json", ".txt", ".html", ".csv", ""}
    for name in filter(None, git.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in suffixes and path.is_file() and path != Path(__file__):
            assert not forbidden.search(path.read_text(encoding="utf-8", errors="replace")), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def python_with(requirement: str, folder: Path) -> Path:
    """The interpreter of a new environment with nothing but a requirement."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", requirement]
    subprocess.run(install, check=True, capture_output=True)
    return python


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel for a CPU, installed alone in a new environment."""
    return python_with(f"{wheel}[cpu]", tmp_path_factory.mktemp("cpu"))


def run_clean(python: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [python, *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def test_the_base_install_brings_no_torch(clean_python: Path) -> None:
    listed = json.loads(run_clean(clean_python, "-m", "pip", "list", "--format", "json").stdout)
    names = {package["name"].lower().replace("_", "-") for package in listed}
    assert "babeltower" in names
    assert not names & {"torch", "transformers", "onnx", "open-clip-torch", "openvino", "tritonclient"}


def test_an_install_without_an_engine_names_the_extras_that_bring_one(
    wheel: Path, exported: Exported, tmp_path: Path
) -> None:
    python = python_with(str(wheel), tmp_path)
    listed = run_clean(python, "-m", "babeltower", "engines")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert len(lines) == 4
    assert all("cannot run: " in line for line in lines)
    for extra in ("cpu", "gpu", "openvino", "tensorrt"):
        assert f"pip install 'babeltower[{extra}]'" in listed.stdout
    model = str(exported("nllb-clip"))
    code = f"from babeltower import Encoder; Encoder.open({model!r}).embed_texts(['gato'], 'por_Latn')"
    failed = run_clean(python, "-c", code)
    assert failed.stderr.splitlines()[-1] == (
        "runtime.errors.MissingPackageError: Running an ONNX file needs onnxruntime, which is not installed. "
        "Run: pip install 'babeltower[cpu]', or with an NVIDIA GPU: pip install 'babeltower[gpu]'"
    )


def test_the_base_install_embeds(clean_python: Path, exported: Exported) -> None:
    code = (
        "import sys; from runtime import Encoder\n"
        f"encoder = Encoder.open({str(exported('nllb-clip'))!r}, threads=1)\n"
        "vectors = encoder.embed_texts(['gato', '猫'], language=['por_Latn', 'zho_Hans'])\n"
        "assert vectors.shape == (2, encoder.dim)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
        "print('ok')"
    )
    result = run_clean(clean_python, "-c", code)
    assert result.stdout == "ok\n", result.stderr


COMMANDS_OF_A_PLAIN_INSTALL = {
    "export": (["CHECKPOINT", "out"], "babeltower[export]"),
    "quantize": (["CHECKPOINT", "out", "--engine", "onnxruntime"], "babeltower[export]"),
    "frontends": (["MODEL"], "babeltower[client]"),
    "tune": (["MODEL"], "babeltower[client]"),
    "serve": (["nowhere"], "nowhere"),
    "ready": (["nowhere"], "has no model with front ends"),
    "rollout": (["MODEL", "--to", "MODEL", "--url", "grpc://127.0.0.1:1"], "babeltower[client]"),
    "embed": (["MODEL", "texts.txt", "--out", "vectors", "--language", "pt"], "babeltower[corpus]"),
    "index": (["vectors", "--out", "i"], "babeltower[index]"),
    "status": (["vectors"], "holds no output of babeltower embed"),
    "verify": (["vectors"], "holds no output of babeltower embed"),
    "search": (["MODEL", "pictures", "gato preto", "--language", "pt"], ""),
    "inspect": (["MODEL"], ""),
    "engines": ([], ""),
    "languages": (["MODEL"], ""),
}
"""Command → its arguments, and the words that tell what it lacks; none where it works."""


@pytest.mark.parametrize("command", [entry.name for entry in COMMANDS])
def test_every_command_of_a_plain_install_works_or_says_what_it_needs(
    command: str, clean_python: Path, exported: Exported, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("um gato\n")
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "part-00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(dataset.load_gallery()[0].png)
    places = {"MODEL": str(exported("nllb-clip")), "CHECKPOINT": str(CHECKPOINTS / "capivara")}
    arguments, lacks = COMMANDS_OF_A_PLAIN_INSTALL[command]
    script = clean_python.parent / "babeltower"
    done = subprocess.run(
        [script, command, *(places.get(word, word) for word in arguments)],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if not lacks:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lacks in line
