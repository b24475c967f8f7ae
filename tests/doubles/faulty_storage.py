"""Storage that fails now and then: an HTTP server of a folder, and local files that raise errors of the "
"disk."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from runtime.corpus import reading

HTTP_FAULTS = ("503", "429", "reset", "short", "early")
"""Busy, too many requests, a connection that is reset, half a body, and an end before any answer."""


class FaultyServer(ThreadingHTTPServer):
    """Server of a folder, with ranges, in which a share of the requests fails.

    Attributes:
        share: Share of requests that fail, from 0 to 1; 1 for a store that is down.
        n_certain: Next requests that fail whatever the share is.
        met: Fault → number of requests that met it.
    """

    daemon_threads = True

    def __init__(self, folder: Path, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.share, self.n_certain = folder, share, 0
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self.met: Counter[str] = Counter()
        self.statuses: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        with self._lock:
            is_certain, self.n_certain = self.n_certain > 0, max(0, self.n_certain - 1)
            if not is_certain and self._chance.random() >= self.share:
                return None
            fault = self._chance.choice(HTTP_FAULTS)
            self.met[fault] += 1
            return fault

    def handle_error(self, request, client_address):
        """Say nothing: resets are meant."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        server = self.server
        name = unquote(urlsplit(self.path).path)
        path = server.folder / name.lstrip("/")
        match server.fault():
            case "503":
                return self.status(503)
            case "429":
                return self.status(429, {"Retry-After": "0"})
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            case "early":
                self.close_connection = True
                return None
            case fault:
                if name in server.statuses:
                    return self.status(server.statuses[name])
                if not path.is_file():
                    return self.status(404)
                return self.send(path, with_body, is_short=fault == "short")

    def send(self, path, with_body, *, is_short):
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if found:
            first, last = int(found[1]), min(last, int(found[2] or last))
        body = data[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if is_short else body)
            self.close_connection = self.close_connection or is_short

    def status(self, code, headers=None):
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format, *arguments):
        """Say nothing."""


@contextlib.contextmanager
def faulty_server(folder: Path, *, share: float, seed: int = 0) -> Iterator[FaultyServer]:
    """Serve a folder on this machine while the block runs."""
    server = FaultyServer(folder, share, seed)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def faulty_disk(monkeypatch: pytest.MonkeyPatch, *, share: float, seed: int = 0) -> Counter[str]:
    """Let a share of the reads and openings of local files fail with EIO or EMFILE; return the counts."""
    chance = random.Random(seed)
    met: Counter[str] = Counter()
    lock = threading.Lock()
    real_open, real_fetched = reading.RetryingFile._open, reading.fetched
    real_read = reading.RetryingFile._read_once

    def fail(path: str, *numbers: int) -> None:
        with lock:
            if chance.random() < share:
                number = chance.choice(numbers)
                met[errno.errorcode[number]] += 1
                raise OSError(number, os.strerror(number), path)

    def opening(self):
        fail(self._path, errno.EMFILE, errno.EIO)
        return real_open(self)

    def reads(self, n_bytes):
        fail(self._path, errno.EIO, errno.ESTALE)
        return real_read(self, n_bytes)

    def fetches(filesystem, path):
        fail(path, errno.EIO, errno.EMFILE, errno.ESTALE)
        return real_fetched(filesystem, path)

    monkeypatch.setattr(reading.RetryingFile, "_open", opening)
    monkeypatch.setattr(reading.RetryingFile, "_read_once", reads)
    monkeypatch.setattr("runtime.corpus.rows.fetched", fetches)
    return met
