"""What is checked before a server's environment is made, and what is said if it cannot be made."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from sample_models import Exported
from typer.testing import CliRunner

from runtime.commands.app import app
from runtime.errors import EngineError
from runtime.manifest import Manifest, Precision, manifest_path
from runtime.server import environment, environment_from_folder
from runtime.server.process import require_repository


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(made: object) -> None:
        pytest.fail("the environment was made first")

    monkeypatch.setattr(environment, "_make", made)


def message_of(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["model", "missing", "empty", "file"])
@pytest.mark.usefixtures("no_environment")
def test_a_server_looks_at_its_repository_first(tmp_path: Path, kind: str) -> None:
    manifest_path(tmp_path / "model").write_text("{}")
    (tmp_path / "empty" / "notes").mkdir(parents=True)
    (tmp_path / "file").touch()
    expected = {
        "model": f"is a model, not a repository. A server serves every model of one: pass {tmp_path}.",
        "missing": "is not a folder. Pass the folder that `babeltower export` wrote to.",
        "empty": "holds no models. Pass the folder that `babeltower export` wrote to.",
        "file": "is not a folder. Pass the folder that `babeltower export` wrote to.",
    }
    for target in ("cpu", "gpu"):
        said = message_of("serve", tmp_path / kind, "--env", tmp_path / "env", "--target", target)
        assert said == f"error: {tmp_path / kind} {expected[kind]}"


def test_a_repository_without_manifests_is_served(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.pbtxt").touch()
    require_repository(tmp_path)


@pytest.mark.usefixtures("no_environment")
def test_tuning_looks_at_its_model_first(tmp_path: Path, exported: Exported) -> None:
    pytest.importorskip("rich")
    model = exported("nllb-clip")
    said = message_of("tune", model.parent, "--env", tmp_path / "env")
    assert "is a repository, not a model" in said
    without = dataclasses.replace(Manifest.read(model), front_ends=())
    manifest_path(tmp_path / model.name).write_text(without.to_json())
    said = message_of("tune", tmp_path / model.name, "--env", tmp_path / "env")
    assert "has no front ends to tune" in said


def test_front_ends_of_one_of_several_variants(tmp_path: Path, exported: Exported) -> None:
    manifest = Manifest.read(exported("nllb-clip"))
    fp32 = manifest.variants["fp32"]
    int8 = dataclasses.replace(fp32, precision=Precision.INT8, engines=("openvino",))
    two = {"fp32": fp32, "int8_openvino": int8}
    several = dataclasses.replace(manifest, front_ends=(), variants=two)
    manifest_path(tmp_path / manifest.name).write_text(several.to_json())
    said = message_of("frontends", tmp_path / manifest.name)
    assert "has the variants ['fp32', 'int8_openvino']; choose one with --variant" in said
    said = message_of("frontends", tmp_path / manifest.name, "--variant", "fp16")
    assert "has no variant 'fp16'; choose one of ['fp32', 'int8_openvino']." in said


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('on stdout'); print(' ', file=sys.stderr); sys.exit(3)", "code 3:\non stdout"),
        ("import sys; sys.exit('ERROR: No matching distribution')", "code 1:\nERROR: No matching"),
        ("import os; os.kill(os.getpid(), 9)", "code -9:\nit printed nothing; was it stopped"),
    ],
)
def test_a_failed_environment_says_why(monkeypatch, program: str, reason: str) -> None:
    with pytest.raises(EngineError, match="Creating the server's environment failed") as refused:
        environment._run([sys.executable, "-c", program])
    assert reason in str(refused.value)


def test_a_folder_that_cannot_hold_an_environment_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="file is not a folder"):
        environment_from_folder(tmp_path / "file")
    with pytest.raises(EngineError, match=r"cannot be created: .*file.*--env"):
        environment_from_folder(tmp_path / "file" / "inside")
