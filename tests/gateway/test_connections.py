"""Connections of strangers: heads, bodies and reading have bounds, and everybody else is still answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tls_double import authority

from runtime.commands.doors import Door, running_door
from runtime.gateway.options import GatewayOptions
from runtime.gateway.serving import running_gateway

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n"
REFUSED = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


@contextlib.contextmanager
def gateway(options: GatewayOptions | None = None) -> Iterator[tuple[str, int]]:
    """A gateway without a model: what it refuses, it refuses before it looks for one."""
    with running_door(Door("127.0.0.1", 0, options or GatewayOptions()), []) as url:
        host, _, port = url.rpartition("/")[2].rpartition(":")
        yield host, int(port)


def status_of_health(address: tuple[str, int]) -> int:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", trust_env=False, timeout=60) as client:
        return client.get("/health").status_code


def everything(connection: socket.socket) -> bytes:
    """What is received until the gateway closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65_536):
            received += part
    return received


def answer_to(address: tuple[str, int], *parts: bytes) -> bytes:
    with socket.create_connection(address, timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        return everything(connection)


HEADS = {
    "a header": (HEALTH + b"X: ", b"a" * 100_000, b"\r\n\r\n"),
    "a header of many megabytes": (HEALTH + b"X: ", b"a" * 60_000_000, b"\r\n\r\n"),
    "a header without a value": (HEALTH, b"a" * 2_000_000),
    "many headers": (HEALTH, b"a: b\r\n" * 20_000, b"\r\n"),
    "headers a little too long together": (HEALTH, *[b"a: " + b"b" * 8_000 + b"\r\n"] * 9, b"\r\n"),
    "a path": (b"GET /", b"a" * 100_000, b" HTTP/1.1\r\n\r\n"),
    "a query": (b"GET /health?", b"a" * 100_000, b" HTTP/1.1\r\n\r\n"),
    "the second request": (HEALTH + b"\r\n", HEALTH, b"X: " + b"a" * 2_000_000),
}


@pytest.mark.parametrize("what", HEADS)
def test_large_heads_are_refused(what: str) -> None:
    with gateway() as address:
        received = answer_to(address, *HEADS[what])
        assert REFUSED in received or (what == "the second request" and received == b"")
        assert status_of_health(address) == 200


@pytest.mark.parametrize(
    "rest", [b"a: b\r\n" * 20_000, b"a: " + b"b" * 200_000, b"1;" + b"x" * 200_000], ids=lambda rest: rest[:3]
)
def test_large_trailers_and_extensions_of_chunks_end_the_connection(rest: bytes) -> None:
    start = b"1\r\n{\r\n" + (b"" if rest.startswith(b"1;") else b"0\r\n")
    with gateway() as address, socket.create_connection(address, timeout=60) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + start)
        with contextlib.suppress(ConnectionError):
            connection.sendall(rest)
        received = everything(connection)
        assert b" 404 " in received or b" 431 " in received or received == b""
        assert status_of_health(address) == 200


def test_a_head_within_the_limit_is_read() -> None:
    with gateway() as address:
        head = HEALTH + b"Connection: close\r\nX: " + b"a" * 60_000 + b"\r\n\r\n"
        for parts in ((head,), tuple(head[i : i + 7_000] for i in range(0, len(head), 7_000))):
            assert answer_to(address, *parts).startswith(b"HTTP/1.1 200 OK")


def test_what_is_no_http_is_refused() -> None:
    with gateway() as address:
        for sent in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        ):
            assert answer_to(address, sent).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"POST /v1", HEALTH, HEALTH + b"X: a"])
def test_a_head_that_does_not_come_ends_the_connection(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gateway.protocol._HEAD_S", 0.5)
    with gateway() as address:
        assert answer_to(address, begun) == b""


def test_a_head_that_comes_in_drops_has_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is not a reason to wait longer; nor are the rest of a refused body, or blank lines."""
    monkeypatch.setattr("runtime.gateway.protocol._HEAD_S", 0.5)
    monkeypatch.setattr("runtime.gateway.serving._KEEP_ALIVE_S", 0.5)
    begun = (
        HEALTH + b"X: ",
        POST + b"Content-Length: 99999999\r\n\r\n",
        HEALTH + b"\r\n",
    )
    for start, drop in zip(begun, (b"a", b" ", b"\r\n"), strict=True):
        with gateway() as address, socket.create_connection(address) as connection:
            connection.sendall(start)
            connection.settimeout(0.05)
            is_open = True
            while is_open:
                try:
                    connection.sendall(drop)
                    is_open = connection.recv(1_000) != b""
                except TimeoutError:
                    pass
                except ConnectionError:
                    is_open = False


def test_a_connection_is_kept_and_then_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has its own time, however old its connection is; an idle connection is closed."""
    monkeypatch.setattr("runtime.gateway.protocol._HEAD_S", 1.0)
    monkeypatch.setattr("runtime.gateway.serving._KEEP_ALIVE_S", 4)
    with gateway() as address, socket.create_connection(address, timeout=60) as connection:
        for _ in range(3):
            connection.sendall(HEALTH)
            threading.Event().wait(0.6)
            connection.sendall(b"\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 OK")
        assert everything(connection) == b""


def test_pipelined_requests_are_answered_in_order_and_bounded() -> None:
    with gateway() as address:
        few = b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % i for i in range(20))
        last = HEALTH + b"Connection: close\r\n\r\n"
        received = answer_to(address, few + last)
        assert received.count(b"HTTP/1.1 404 ") == 20
        assert received.index(b"HTTP/1.1 200 ") > received.rindex(b"HTTP/1.1 404 ")
        assert answer_to(address, few * 100 + last).count(b"HTTP/1.1 ") < 100
        assert status_of_health(address) == 200


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"-1\r\n{", 400),
        (b"fffffffffffffffff\r\n{", 400),
        (b"1\r\n{}\r\n", 400),
        (b"1;" + b"a" * 200_000, 431),
    ],
    ids=["negative", "too large", "longer than it says", "with an extension"],
)
def test_damaged_chunks_are_told_so(rest: bytes, status: int) -> None:
    """Though the request that they belong to has begun."""
    with gateway() as address:
        received = answer_to(address, POST + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert received.count(b"HTTP/1.1 ") == 1
        assert status_of_health(address) == 200


def test_connections_that_are_ended_write_nothing_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with gateway(GatewayOptions(max_connections=4)) as address:
        answer_to(address, (HEALTH + b"\r\n") * 500)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection(address, timeout=60)).sendall(
                    POST + b"Content-Length: 9\r\n\r\n{"
                )
            assert status_of_health(address) == 200
    assert caplog.text == ""


def test_half_requests_do_not_keep_others_out() -> None:
    """Those that wait longest make room; whoever asks is answered."""
    with gateway(GatewayOptions(max_connections=32)) as address, contextlib.ExitStack() as stack:
        asked = stack.enter_context(socket.create_connection(address, timeout=60))
        half = []
        for i in range(200):
            half.append(stack.enter_context(socket.create_connection(address, timeout=60)))
            half[-1].sendall(POST + (b"" if i % 2 else b"Content-Length: 9\r\n\r\n{"))
            if i % 20 == 0:
                assert status_of_health(address) == 200
        assert status_of_health(address) == 200
        n_open = 0
        for connection in half:
            connection.setblocking(False)
            try:
                n_open += connection.recv(1) != b""
            except BlockingIOError:
                n_open += 1
            except ConnectionError:
                pass
        assert n_open <= 32
        del asked


async def answered_lifespan(receive: Any, send: Any) -> None:
    for part in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{part}.complete"})


def test_requests_that_are_answered_make_no_room() -> None:
    goes_on = threading.Event()
    running = threading.Semaphore(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await answered_lifespan(receive, send)
            return
        await receive()
        running.release()
        await asyncio.get_running_loop().run_in_executor(None, goes_on.wait)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    options = GatewayOptions(max_connections=8)
    with running_gateway(app, "127.0.0.1", 0, options) as place, contextlib.ExitStack() as stack:
        host, _, port = place.rpartition(":")
        address = host, int(port)
        asked = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(4)]
        for connection in asked:
            connection.sendall(HEALTH + b"Connection: close\r\n\r\n")
            running.acquire()
        for _ in range(50):
            stack.enter_context(socket.create_connection(address, timeout=60)).sendall(POST)
        goes_on.set()
        assert [everything(connection)[:15] for connection in asked] == [b"HTTP/1.1 200 OK"] * 4


def test_an_answer_that_is_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gateway.protocol._WRITE_S", 0.5)
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await answered_lifespan(receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        ended.set()

    with (
        running_gateway(app, "127.0.0.1", 0, GatewayOptions()) as place,
        socket.create_connection(("127.0.0.1", int(place.rpartition(":")[2]))) as connection,
    ):
        connection.sendall(HEALTH + b"\r\n")
        assert ended.wait(60)


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x02"], ids=["nothing", "a part"])
def test_a_slow_handshake_of_tls_ends(begun: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gateway.serving._HANDSHAKE_S", 0.5)
    monkeypatch.setattr("runtime.gateway.protocol._HEAD_S", 0.5)
    own = authority(tmp_path / "own")
    options = GatewayOptions(certificate=own.certificate, key=own.key)
    with gateway(options) as address:
        assert answer_to(address, begun) == b""
        context = ssl.create_default_context(cafile=str(own.ca))
        for part in (b"", HEALTH, HEALTH + b"X: " + b"a" * 10_000_000):
            plain = socket.create_connection(address)
            with (
                context.wrap_socket(plain, server_hostname=address[0]) as secure,
                contextlib.suppress(OSError),
            ):
                secure.sendall(part)
                while secure.recv(65_536):
                    pass


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Transfer-Encoding: gzip, chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n", 501),
        (b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n", 501),
        (b"Transfer-Encoding: deflate, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"Transfer-Encoding: Chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n", 404),
        (b"Content-Encoding: GZIP\r\nContent-Length: 1\r\n\r\n{", 415),
        (b"Content-Encoding: gzip\r\nContent-Encoding: identity\r\nContent-Length: 1\r\n\r\n{", 415),
        (b"Content-Encoding: identity\r\nContent-Length: 1\r\n\r\n{", 404),
        (b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n{", 400),
        (b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n{", 400),
        (b"Inference-Header-Content-Length: " + b"9" * 5_000 + b"\r\n\r\n", 404),
    ],
)
def test_codings_of_bodies(headers: bytes, status: int) -> None:
    with gateway() as address:
        received = answer_to(address, POST + b"Connection: close\r\n" + headers)
        assert received.startswith(b"HTTP/1.1 %d " % status), received


VALUES = {
    "numbers": b'{"model":"x","input":[' + b"0," * 24_000_000 + b"0]}",
    "keys": b"{" + b'"a":1,' * 8_000_000 + b'"b":1}',
    "empty texts": b'{"model":"x","input":[' + b'"",' * 16_000_000 + b'""]}',
    "a wide text": b'{"model":"x","input":"' + "猫".encode() + b"a" * 48_000_000 + b'"}',
    "many wide texts": b'{"model":"x","input":[' + (b'"' + b"a" * 16_000 + b'\\u732b",') * 2_990 + b'""]}',
    "quotes": b'"' * 48_000_000,
    "closed brackets": b"]" * 48_000_000,
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("what", VALUES)
def test_values_of_json_are_counted_before_they_are_parsed(what: str) -> None:
    """The gateway is in this process, whose peak of memory is measured around the request."""
    body = VALUES[what]
    with gateway(GatewayOptions(max_image_json_bytes=64 << 20)) as address:
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_of_process("VmRSS")
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(body), 1 << 16):
                    connection.sendall(memoryview(body)[start : start + (1 << 16)])
            received = everything(connection)
        assert received.startswith(b"HTTP/1.1 413 ") or received == b""
        assert memory_of_process("VmHWM") - before < 64_000_000


def memory_of_process(name: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
