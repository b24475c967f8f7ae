"""A server beside anything: odd paths, foreign folders, broken models, proxies, unusable options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sample_models import Exported

from runtime import Encoder
from runtime.errors import EngineError, ManifestError
from runtime.manifest import manifest_path
from runtime.server import ServerEnvironment, ServerOptions, running_server

NAMES = ("capivara", "nllb-siglip-mrl")


def copied(exported: Exported, names: tuple[str, ...], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        model = exported(name)
        for path in model.parent.glob(f"{name}[._]*"):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    return folder


@pytest.mark.parametrize("name", ["a b", "$HOME", "naïve 猫", "it's", "a;b", '"', "a%20b", "[x]*"])
def test_any_path_of_a_repository_serves(
    name: str,
    exported: Exported,
    server_environment: ServerEnvironment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    repository = copied(exported, NAMES[:1], tmp_path / name / "r")
    for foreign in (".git", "lost+found", "my notes"):
        (repository / foreign).mkdir()
    said: list[str] = []
    options = ServerOptions(ready_s=60)
    with (
        Encoder.open(repository / NAMES[0], threads=1) as local,
        running_server(
            repository, environment=server_environment, options=options, say=said.append
        ) as server,
    ):
        expected = local.embed_texts(["um gato"])
        for address in (f"grpc://{server.addresses.grpc}", f"http://{server.addresses.http}"):
            with Encoder.open(f"{address}/{NAMES[0]}") as remote:
                np.testing.assert_allclose(remote.embed_texts(["um gato"]), expected, atol=1e-6)
    assert said == ["left alone, since no manifest names them: .git, lost+found, my notes"]


def test_a_temporary_folder_of_an_odd_name_is_not_used(
    exported: Exported,
    server_environment: ServerEnvironment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tempfile

    odd = tmp_path / "tmp $x y"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    repository = copied(exported, NAMES[:1], tmp_path / "r")
    with running_server(repository, environment=server_environment) as server:
        assert {model["state"] for model in server.models()} == {"READY"}
        assert not server.log.is_relative_to(odd)


def broken(repository: Path, how: str) -> str:
    """Break the first model; return what the reason says."""
    name = NAMES[0]
    if how == "manifest":
        manifest_path(repository / name).write_text("{")
        return "is not valid JSON"
    if how == "a file":
        path = repository / f"{name}_text" / "1" / "model.py"
        path.write_text(path.read_text() + "\n")
        return "the manifest says"
    if how == "a folder":
        shutil.rmtree(repository / f"{name}_image")
        return "is missing"
    if how == "configuration":
        path = repository / f"{name}_text_tower_fp32" / "config.pbtxt"
        path.write_text(path.read_text() + "nonsense {")
        return "failed to read text proto"
    path = repository / f"{name}_text" / "1" / "runtime" / "errors.py"
    path.write_text("import no_such_package\n")
    return "No module named 'no_such_package'"


@pytest.mark.parametrize("how", ["manifest", "a file", "a folder", "configuration", "code"])
def test_a_broken_model_is_named_and_left(
    how: str, exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    repository = copied(exported, NAMES, tmp_path / "r")
    reason = broken(repository, how)
    said: list[str] = []
    verified = how in ("manifest", "a file", "a folder")  # the others are noticed by the server only
    options = ServerOptions(leave_broken=True, verify=verified, ready_s=120)
    with running_server(
        repository, environment=server_environment, options=options, say=said.append
    ) as server:
        assert {model["name"].partition("_")[0] for model in server.models()} == {NAMES[1]}
        with Encoder.open(f"grpc://{server.addresses.grpc}/{NAMES[1]}") as remote:
            assert remote.embed_texts(["gato"], "por_Latn").shape == (1, remote.dim)
    assert len(said) == 1
    assert said[0].startswith(f"left out: {NAMES[0]}: ")
    assert reason in said[0]
    with (
        pytest.raises((EngineError, ManifestError), match=re.escape(reason)),
        running_server(
            repository, environment=server_environment, options=ServerOptions(verify=verified, ready_s=120)
        ),
    ):
        pass


def test_the_only_model_is_not_left_out(
    exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    repository = copied(exported, NAMES[:1], tmp_path / "r")
    reason = broken(repository, "code")
    options = ServerOptions(leave_broken=True, verify=False, ready_s=120)
    with (
        pytest.raises(EngineError, match=reason) as failure,
        running_server(repository, environment=server_environment, options=options),
    ):
        pass
    assert not re.search("cuda|nvml|dcgm", str(failure.value), re.IGNORECASE)


def test_the_last_words_are_of_this_run(
    exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    log.write_text("E1128 00:00:00.000000 1 old.cc:1] a failure of yesterday\n")
    repository = copied(exported, NAMES[:1], tmp_path / "r")
    reason = broken(repository, "code")
    options = ServerOptions(verify=False, log=log, ready_s=120)
    with (
        pytest.raises(EngineError, match=reason) as failure,
        running_server(repository, environment=server_environment, options=options),
    ):
        pass
    assert "yesterday" not in str(failure.value)
    assert log.read_text().startswith("E1128 00:00:00.000000 1 old.cc:1] a failure of yesterday\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", "99999"], "99999 is no port; expected 0 to 65535"),
        (["--port=8123", "--grpc-port=8123"], "a different one for each"),
        (["--log", "."], "is not a file"),
        (["--log", "no-such-folder/server.log"], "cannot be written"),
        (["--host", "no such host"], "no address to listen on"),
        (["--host", "::1"], "is an IPv6 address, and serve listens on IPv4"),
    ],
)
def test_unusable_options_are_one_line(
    options: list[str],
    expected: str,
    exported: Exported,
    server_environment: ServerEnvironment,
    tmp_path: Path,
) -> None:
    repository = exported(NAMES[0]).parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "babeltower", "serve", str(repository), "--port=0", "--grpc-port=0"),
            *("--metrics-port=0", f"--env={server_environment.folder}", *options),
        ],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def crashing(environment: ServerEnvironment, folder: Path, *, n_crashes: int) -> ServerEnvironment:
    """The environment with a server that aborts at its first starts, and then is the real one."""

    class Crashing(ServerEnvironment):
        @property
        def triton(self) -> Path:
            return folder

    (folder / "bin").mkdir(parents=True)
    for path in environment.triton.iterdir():
        if path.name != "bin":
            (folder / path.name).symlink_to(path)
    program = folder / "bin" / "tritonserver"
    program.write_text(
        f'#!/bin/sh\necho start >> "{folder}/starts"\n'
        f'[ $(wc -l < "{folder}/starts") -gt {n_crashes} ] || kill -ABRT $$\n'
        f'exec "{environment.triton}/bin/tritonserver" "$@"\n'
    )
    program.chmod(0o755)
    return Crashing(environment.folder)


@pytest.mark.parametrize("n_crashes", [4, 5])
def test_a_crash_of_the_start_is_tried_again_and_said(
    n_crashes: int, exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    repository = copied(exported, NAMES[:1], tmp_path / "r")
    environment = crashing(server_environment, tmp_path / "env", n_crashes=n_crashes)
    said: list[str] = []
    running = running_server(repository, environment=environment, say=said.append)
    if n_crashes == 4:
        with running as server:
            assert server.is_ready()
    else:
        with pytest.raises(EngineError, match="exited with code -6"), running:
            pass
    assert len(said) == 4
    assert all("exited with code -6" in line and "is started again" in line for line in said)
