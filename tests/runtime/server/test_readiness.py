"""Readiness of what answers otherwise than a model: other servers, broken answers, work without an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serving import wait_until
from typer.testing import CliRunner

from runtime.commands.app import app
from runtime.server import readiness
from runtime.server.readiness import (
    MOST_BUSY_S,
    FrontEndProbe,
    HttpEndpoint,
    ProbeResult,
    faults_of_server,
    probes_of_repository,
    results_of_probes,
    stubs_of_server,
    too_long_busy,
)

MODEL = "clip_text"
PROBE = FrontEndProbe(MODEL, {"text": b"a"}, array("f", [1.0, 0.0]), 0.9)
COMPUTING, IDLE = "while True: pass", "import time; time.sleep(600)"
OK = b"HTTP/1.1 200 OK\r\n"

ANSWERS = {
    "grpc": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x7f\xff\xff\xff",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "html": OK + b"Content-Length: 5\r\n\r\n<h1/>",
    "short": OK + b'Content-Length: 500\r\n\r\n{"a":1',
    "json": OK + b"Content-Length: 2\r\n\r\n{}",
    "array": OK + b"Content-Length: 2\r\n\r\n[]",
    "deep": OK + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
    "chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "head": OK + b"Inference-Header-Content-Length: x\r\nContent-Length: 2\r\n\r\n{}",
    "vector": OK + b"Inference-Header-Content-Length: 0\r\nContent-Length: 3\r\n\r\nabc",
    "missing": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "failure": b"HTTP/1.1 500 E\r\nContent-Length: 3\r\n\r\nabc",
    "no length": b"HTTP/1.1 500 E\r\nContent-Length: 30\r\n\r\nabc",
}


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[HttpEndpoint]:
    """Server that sends the same bytes to everybody, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.recv(1 << 16)
                        client.sendall(answer or b"")
                        client.shutdown(socket.SHUT_WR)
                        while client.recv(1 << 16):  # a close with bytes unread would be a reset
                            pass

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield HttpEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def watched(n_looks: int) -> Iterator[HttpEndpoint]:
    """``serve`` that refuses every probe; it is well again after as many looks at its counters."""
    looks: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Babeltower-Health", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            if self.path == "/v2/health/ready":
                self.answer(200 if len(looks) >= n_looks else 503)
            else:
                looks.append(self.path)
                self.answer(404)

        def do_POST(self) -> None:
            looks.clear()
            self.answer(503)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield HttpEndpoint(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@contextlib.contextmanager
def front_end(code: str) -> Iterator[int]:
    """Process with the arguments of Triton's process of a Python model; this one stands for its server."""
    words = ["triton_python_backend_stub", "-c", code, *"34567", f"{MODEL}_0_0"]
    process = subprocess.Popen(words, executable=sys.executable)
    try:
        wait_until(lambda: any(s.pid == process.pid for s in stubs_of_server(os.getpid())), "it runs")
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_what_is_no_models_answer_is_a_fault(answer: bytes) -> None:
    with answering(answer) as endpoint:
        (fault,) = faults_of_server(endpoint, [PROBE])
    assert fault.startswith(f"{MODEL}: ")
    assert "is not babeltower's HTTP port" in fault


def test_a_server_that_hangs_up_or_is_not_there_is_a_fault() -> None:
    with answering(b"") as endpoint:
        assert len(faults_of_server(endpoint, [PROBE], 0.3)) == 1
    assert len(faults_of_server(endpoint, [PROBE], 0.3)) == 1


def test_a_probe_without_a_result_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("a case that nobody thought of")

    monkeypatch.setattr(readiness, "_result_of_probe", failing)
    assert faults_of_server(HttpEndpoint("http://127.0.0.1:9"), [PROBE]) == [
        f"{MODEL}: RuntimeError: a case that nobody thought of"
    ]
    monkeypatch.setattr(threading.Thread, "run", lambda _: None)
    assert faults_of_server(HttpEndpoint("http://127.0.0.1:9"), [PROBE]) == [
        f"{MODEL}: its probe has no result"
    ]


@pytest.mark.parametrize("code", [COMPUTING, IDLE])
def test_a_model_that_computes_is_busy_and_one_that_does_not_hangs(code: str) -> None:
    with front_end(code), answering(None) as endpoint:
        time.sleep(0.5)  # the time of its own start is not that of a request
        (found,) = results_of_probes(endpoint, [PROBE], 2.0, server=os.getpid())
    assert found.is_busy == (code == COMPUTING)
    assert bool(found.fault) == (code == IDLE)
    assert not (found.is_busy and found.has_answered)


def test_a_stopped_process_is_never_busy() -> None:
    with front_end(COMPUTING) as pid, answering(None) as endpoint:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: next(s.state for s in stubs_of_server(os.getpid()) if s.pid == pid) == "T", "stop")
        (found,) = results_of_probes(endpoint, [PROBE], 0.5, server=os.getpid())
    assert found.fault
    assert not found.is_busy


@pytest.mark.parametrize("n_looks", [0, 1])
def test_serve_is_believed_if_it_is_well_from_the_refusal_on(n_looks: int) -> None:
    """A server that is started again meanwhile refused the probe because it was down, not busy."""
    with watched(n_looks) as endpoint:
        (found,) = results_of_probes(endpoint, [PROBE], 0.3)
    assert found.is_busy == (n_looks == 0)
    assert bool(found.fault) == (n_looks > 0)


def test_a_model_that_computes_for_ever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = ProbeResult(MODEL, is_busy=True, has_answered=False)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    since: dict[str, float] = {}
    assert not too_long_busy([busy], since)
    now[0] += MOST_BUSY_S / 2
    assert not too_long_busy([ProbeResult(MODEL, is_busy=True)], since)  # it answered others
    assert not too_long_busy([busy], since)
    now[0] += MOST_BUSY_S + 1
    assert too_long_busy([busy], since) == [f"{MODEL}: it computes for 300 s without an answer"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"front_ends": [{}]}', b'{"front_ends": 3}'])
def test_damaged_manifests_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.babeltower.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.babeltower\.json: "):
        probes_of_repository(tmp_path)
    ended = CliRunner().invoke(app, ["ready", str(tmp_path)])
    assert ended.exit_code


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://h:99999", "http://[::1", "grpc://h:1"])
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["ready", str(tmp_path), "--url", url])
    assert "is not an HTTP address" in " ".join(ended.output.split())


@pytest.mark.parametrize("url", ["http://h:8000/v2", "http://h:8000/?a=b", "http://me:secret@h:8000"])
def test_an_address_has_no_path(url: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["ready", str(tmp_path), "--url", url])
    assert "is more than an address" in " ".join(ended.output.split())
