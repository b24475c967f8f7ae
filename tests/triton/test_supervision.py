"""A served repository that is left alone: what is killed or stopped is noticed, and comes back."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from altered_models import copied
from PIL import Image
from sample_models import Exported
from serving import Serving, wait_until
from typer.testing import CliRunner

from bench.serving.server_faults import Fault, FaultRecord
from runtime import Encoder
from runtime.commands.app import app
from runtime.errors import EngineError
from runtime.probes import Probes
from runtime.remote import Connection
from runtime.server import Server, ServerEnvironment, ServerOptions
from runtime.server.readiness import (
    HttpEndpoint,
    faults_of_server,
    main,
    probes_of_repository,
    stubs_of_server,
)
from runtime.server.supervision import supervised

NAME = "nllb-clip"
FREE_PORTS = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")


@pytest.fixture(scope="module")
def model(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(exported(NAME), tmp_path_factory.mktemp("supervised") / "models")


@pytest.fixture(scope="module")
def serving(model: Path, server_environment: ServerEnvironment) -> Iterator[Serving]:
    """One server for all tests: each leaves it serving again."""
    with Serving(model.parent, server_environment, *FREE_PORTS) as serving:
        serving.wait_until_served()
        yield serving


def is_ready(model: Path, serving: Serving) -> bool:
    return not faults_of_server(HttpEndpoint(serving.address("http")), probes_of_repository(model.parent))


def is_healthy(serving: Serving) -> bool:
    """What a load balancer asks."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        try:
            return client.get(f"{serving.address('http')}/v2/health/ready").status_code == 200
        except httpx.TimeoutException:
            return False


def test_probes_are_read_as_numpy_reads_them(model: Path) -> None:
    whole = Probes.read(model)
    text, image = probes_of_repository(model.parent)
    row = whole.texts.index(text.inputs["text"].decode())
    assert text.inputs["language"].decode() == whole.languages[row]
    assert np.array_equal(np.asarray(text.vector, np.float32), whole.text_vectors[row])
    row = whole.images.index(image.inputs["image"])
    assert np.array_equal(np.asarray(image.vector, np.float32), whole.image_vectors[row])


def test_a_server_that_decodes_is_ready_and_is_not_restarted(model: Path, serving: Serving) -> None:
    """Probes wait behind images that take all cores; texts do not."""
    server, n_images = serving.server_pid, 8
    file = io.BytesIO()
    Image.new("RGBA", (5_600, 5_600)).save(file, "PNG")
    probes = Probes.read(model)
    with (
        Encoder.open(f"{serving.address('grpc')}/{NAME}", connection=Connection(timeout_s=600)) as encoder,
        ThreadPoolExecutor(n_images) as pool,
    ):
        asked = [pool.submit(encoder.embed_images, [file.getvalue()]) for _ in range(n_images)]
        while not all(one.done() for one in asked):
            assert np.abs(encoder.embed_texts(probes.texts[:1], probes.languages[:1])).max() > 0
            assert is_ready(model, serving)
            assert is_healthy(serving)
        assert all(one.result().shape[0] == 1 for one in asked)
    assert serving.server_pid == server
    assert not any("the server is started again" in line for line in serving.lines)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(
    "victim", [f"{NAME}_text_0_0", f"{NAME}_image_0_1", f"{NAME}_text_tower_fp32_0_0", ""]
)
def test_what_is_killed_or_stopped_comes_back(
    victim: str, how: signal.Signals, model: Path, serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    n_starts = sum(line.startswith("metrics ") for line in serving.lines)
    server = serving.server_pid
    assert is_ready(model, serving)
    pid = next((s.pid for s in stubs_of_server(server) if s.instance == victim), server)
    assert (pid == server) == (victim == "")
    os.kill(pid, how)
    wait_until(lambda: not is_healthy(serving), "health is false", patience_s=30)
    wait_until(
        lambda: main([str(model.parent), serving.address("http")]), "readiness is false", patience_s=30
    )
    serving.wait_until_served(n_starts + 1)
    assert serving.server_pid != server
    assert main([str(model.parent), serving.address("http"), "--processes"]) in (
        0,
        1,
    )  # other servers run too
    assert is_ready(model, serving)
    said = "\n".join(serving.lines)
    assert "the server is started again" in said
    probes = Probes.read(model)
    with Encoder.open(f"{serving.address('grpc')}/{NAME}") as encoder:
        found = encoder.embed_texts(probes.texts[:20], probes.languages[:20])
        assert np.abs(found - probes.text_vectors[:20]).max() <= 1e-5


@pytest.mark.parametrize("what", ["grpc", "metrics"])
def test_another_port_is_not_ready(what: str, model: Path, serving: Serving) -> None:
    address = serving.address(what).rpartition("//")[2].partition("/")[0]
    ended = CliRunner().invoke(app, ["ready", str(model.parent), "--url", f"http://{address}"])
    assert ended.exit_code == 1
    assert "is not babeltower's HTTP port" in " ".join(ended.output.split())
    ended = CliRunner().invoke(app, ["ready", str(model.parent), "--url", serving.address("http")])
    assert ended.exit_code == 0
    assert f"{NAME}_text is ready\n{NAME}_image is ready\n" in ended.output


def test_health_is_false_while_a_model_answers_otherwise(model: Path, serving: Serving) -> None:
    """Triton's own readiness is true all the time."""
    assert is_healthy(serving)
    path = model.parent / f"{NAME}.probes.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    try:
        np.savez(path, **{**arrays, "text_vectors": -arrays["text_vectors"]})
        wait_until(lambda: not is_healthy(serving), "health is false")
    finally:
        path.write_bytes(whole)
    wait_until(lambda: is_healthy(serving), "health is true again")


@pytest.mark.parametrize(
    "change",
    [
        {"faults": [Fault("server", "SIGKILL", 5.1, 1.0, 9.0)]},
        {"faults": [Fault("server", "SIGKILL", 1.0, 5.1, 9.0)]},
        {"faults": [Fault("server", "SIGKILL", 1.0, 1.0, 30.1)]},
        {"n_wrong": 1},
        {"n_vectors": 0},
        {"lost": ["a request"]},
    ],
)
def test_the_measurement_of_faults_fails_on_each_of_them(change: dict[str, Any]) -> None:
    good = FaultRecord([Fault("server", "SIGKILL", 1.0, 1.0, 9.0)], n_vectors=10)
    assert good.is_good
    assert not dataclasses.replace(good, **change).is_good


def test_a_server_that_does_not_last_ends_the_command(
    exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    model = copied(exported(NAME), tmp_path / "models")
    with Serving(model.parent, server_environment, *FREE_PORTS) as serving:
        serving.wait_until_served()
        # Gone while it runs: no later start can succeed.
        (model.parent / f"{NAME}_text_tower_fp32" / "1" / "model.onnx").unlink()
        os.kill(serving.server_pid, signal.SIGKILL)
        assert serving.process.wait(120) == 1
    assert any(line.startswith("error: The server was started 7 times in a row") for line in serving.lines)


def test_what_cannot_be_opened_before_the_server_is_no_fault_of_the_server(
    model: Path, server_environment: ServerEnvironment
) -> None:
    """As the gateway, whose port was taken meanwhile; the server would be started again for ever."""
    n_calls = 0

    def started(_: Server) -> None:
        nonlocal n_calls
        n_calls += 1
        raise EngineError("the gateway does not start")

    with pytest.raises(EngineError, match="the gateway does not start"):
        supervised(
            model.parent,
            environment=server_environment,
            options=ServerOptions,
            stop=threading.Event(),
            started=started,
            say=lambda _: None,
        )
    assert n_calls == 1


def test_ready_says_what_answers_and_what_does_not(model: Path, serving: Serving) -> None:
    done = CliRunner().invoke(app, ["ready", str(model.parent), "--url", serving.address("http")])
    assert (done.exit_code, done.stdout) == (0, f"{NAME}_text is ready\n{NAME}_image is ready\n")
    gone = CliRunner().invoke(app, ["ready", str(model.parent), "--url", "http://127.0.0.1:1"])
    assert gone.exit_code == 1
    assert f"{NAME}_text: " in gone.output
    assert "refused" in gone.output


def test_ready_needs_a_repository_with_front_ends(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ready", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "has no model with front ends" in done.stderr
    (tmp_path / "m.babeltower.json").write_text("{")
    done = CliRunner().invoke(app, ["ready", str(tmp_path)])
    assert done.exit_code == 1
    assert "cannot be read" in done.stderr
    done = CliRunner().invoke(app, ["ready", str(tmp_path), "--url", "grpc://127.0.0.1:8001"])
    assert "is not an HTTP address" in done.stderr
