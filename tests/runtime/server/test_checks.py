"""Opening probes of a server that is starting."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from runtime.errors import EngineError
from runtime.server import checks
from runtime.server.checks import _Asked

VECTOR = np.array([[1.0, 2.0]], np.float32)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[int]]]:
    """A server that answers its first requests by 200 and nothing else, then as KServe has it."""
    asked: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(len(asked))
            output = {"name": "vector", "datatype": "FP32", "shape": [1, 2]}
            head = json.dumps({"outputs": [{**output, "parameters": {"binary_data_size": 8}}]}).encode()
            is_empty = len(asked) <= request.param
            self.send_response(200)
            if not is_empty:
                self.send_header("Inference-Header-Content-Length", str(len(head)))
            self.end_headers()
            self.wfile.write(b"{}" if is_empty else head + VECTOR.tobytes())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


@pytest.mark.parametrize("server", [2], indirect=True)
def test_an_answer_without_tensors_is_asked_for_again(
    server: tuple[str, list[int]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_PAUSE_S", 0.0)
    url, asked = server
    with caplog.at_level(logging.WARNING, "babeltower"):
        found = _Asked(url, {}).inferred("m_text", {"x": np.zeros((1, 1), np.int64)}, ["vector"])
    np.testing.assert_array_equal(found["vector"], VECTOR)
    assert len(asked) == 3
    assert caplog.text.count("m_text answered an opening probe by HTTP 200 without tensors: b'{}'") == 2


@pytest.mark.parametrize("server", [9], indirect=True)
def test_a_server_that_never_sends_tensors_fails_its_start(
    server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_PAUSE_S", 0.0)
    url, asked = server
    with pytest.raises(EngineError, match="m_text does not answer its opening probes: HTTP 200 without"):
        _Asked(url, {}).inferred("m_text", {"x": np.zeros((1, 1), np.int64)}, ["vector"])
    assert len(asked) == 3
