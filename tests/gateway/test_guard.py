"""Attacks on the ports: each is refused, or answered right, and the server behind it stays the same."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from gateways import TOKEN, Gateway, gateway_of_process, gateway_of_server
from processes import memory_bytes
from raw_client import bytes_column, infer
from sample_models import Exported
from tritonclient.utils import InferenceServerException

from runtime import Encoder
from runtime.commands.doors import Door, guarded_server
from runtime.errors import EngineError
from runtime.gateway.options import GatewayOptions
from runtime.server import ServerEnvironment, ServerOptions, running_server
from runtime.server.security import Security

NAME = "capivara"
MODELS = ("capivara", "nllb-siglip-mrl")
MOST_BYTES = 64_000_000
INFER = f"/v2/models/{NAME}_text/infer"
RIGHT = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["um gato"]}]}


@pytest.fixture(scope="module", params=[TOKEN, None], ids=["token", "no token"])
def gateway(
    request: pytest.FixtureRequest, exported: Exported, server_environment: ServerEnvironment
) -> Iterator[Gateway]:
    (repository,) = {exported(name).parent for name in MODELS}
    with gateway_of_server(repository, server_environment, MODELS, token=request.param) as found:
        yield found


@pytest.fixture
def guarded(gateway: Gateway) -> Gateway:
    """The gateway whose gRPC is its own too."""
    if gateway.token is None:
        pytest.skip("on this machine and without a token, gRPC is Triton's own")
    return gateway


def bearer(gateway: Gateway) -> dict[str, str]:
    """Metadata of a gRPC client that may ask."""
    return {"authorization": f"Bearer {gateway.token}"}


@pytest.fixture(scope="module")
def expected(exported: Exported) -> np.ndarray:
    with Encoder.open(exported(NAME), threads=1) as encoder:
        return encoder.embed_texts(["um gato"])


@pytest.fixture
def unharmed(gateway: Gateway, expected: np.ndarray) -> Iterator[None]:
    """Afterwards, the same server process answers right, and has not taken much memory."""
    assert gateway.server is not None
    before = memory_bytes(gateway.server.pid)
    yield
    gateway.server.require_running()
    with gateway.client() as client:
        answer = client.post("/v1/embeddings", json={"model": NAME, "input": "um gato"})
        np.testing.assert_allclose(answer.json()["data"][0]["embedding"], expected[0], rtol=0, atol=1e-6)
    assert memory_bytes(gateway.server.pid) - before < MOST_BYTES


def sent(gateway: Gateway, head: str, *parts: bytes, with_token: bool = True) -> str:
    """First line and body of the answer to a request, as it is on the wire."""
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    headers = gateway.headers if with_token else {}
    lines = [head, f"Host: {host}", "Connection: close", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):  # the answer may come before all is sent
            connection.sendall("\r\n".join(lines).encode())
            for part in parts:
                connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(65_536):
                answer += received
    return answer.decode(errors="replace")


def chunked(body: bytes) -> bytes:
    return b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("path", [INFER, "/v1/embeddings"])
def test_a_body_of_many_chunks_is_one_body(path: str, gateway: Gateway) -> None:
    right = RIGHT if path == INFER else {"model": NAME, "input": "um gato"}
    body = json.dumps(right).encode()
    body += b" " * (600_000 - len(body))
    answer = sent(gateway, f"POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked", chunked(body))
    assert answer.startswith("HTTP/1.1 200 ")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/health/ready", 200),
        ("/v2/health/live", 200),
        ("/v2", 200),
        ("/v2/models/none", 404),
        (INFER, 405),
    ],
)
def test_head_is_answered_as_get_is_without_its_body(path: str, status: int, gateway: Gateway) -> None:
    with gateway.client() as client:
        assert client.get(path).status_code == status
    answer = sent(gateway, f"HEAD {path} HTTP/1.1")
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert answer.endswith("\r\n\r\n")


@pytest.mark.usefixtures("unharmed")
def test_an_address_that_is_too_long_is_the_senders_fault(gateway: Gateway) -> None:
    """Triton ends the connection, which would be taken for a server that is gone."""
    with gateway.client() as client:
        for path in ("/v2/models/" + "a" * 20_000, "/v2/models/a?" + "b" * 5_000):
            answer = client.get(path)
            assert answer.status_code == 414
            assert "the most is 4096" in answer.text


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("path", [INFER, "/v1/embeddings", "/v2/repository/index"])
@pytest.mark.parametrize("brackets", [b"[]", b'{"a":}'])
@pytest.mark.parametrize("depth", [100, 100_000, 1_000_000])
def test_deeply_nested_json_is_refused(depth: int, brackets: bytes, path: str, gateway: Gateway) -> None:
    opening, closing = brackets[:-1], brackets[-1:]
    body = b'{"inputs":' + opening * depth + b"1" + closing * depth + b"}"
    answer = sent(gateway, f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}", body)
    assert re.match(r"HTTP/1\.1 (400|413) ", answer)


MANY = {
    "numbers": b"0," * 2_000_000 + b"0]}",
    "texts": b'"a",' * 300_000 + b'"a"]}',
    "quotes without an end": b'"' + b'\\"' * 500_000,
    "backslashes without an end": b'"' + b"\\" * 1_000_001,
    "parameters of a data URL": b'"data:image/a' + b";a" * 1_000_000 + b'"]}',
}
"""Bodies that a parser, or a regular expression, would spend much on."""


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("path", [INFER, "/v1/embeddings"])
@pytest.mark.parametrize("what", MANY)
def test_many_values_are_refused(what: str, path: str, gateway: Gateway) -> None:
    start = b'{"inputs":[' if path == INFER else b'{"model":"capivara","input":['
    body = start + MANY[what]
    answer = sent(gateway, f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}", body)
    assert re.match(r"HTTP/1\.1 (400|413) ", answer)


@pytest.mark.usefixtures("unharmed")
def test_nesting_is_counted_outside_of_texts(gateway: Gateway) -> None:
    text = '[[[[{"\\' * 1_000
    asked = json.loads(json.dumps(RIGHT))
    asked["inputs"][0]["data"] = [text]
    with gateway.client() as client:
        assert client.post(INFER, json=asked).status_code == 200
        assert client.post("/v1/embeddings", json={"model": NAME, "input": text}).status_code == 200


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: 99999999999", 413),
        ("Content-Length: 6500000", 413),
        ("Content-Length: -1", 400),
        ("Content-Length: 2\r\nContent-Encoding: gzip", 415),
        ("Content-Length: 2\r\nInference-Header-Content-Length: 99", 400),
        ("Content-Length: 2\r\nInference-Header-Content-Length: x", 400),
    ],
)
def test_bodies_that_lie_are_refused(head: str, status: int, gateway: Gateway) -> None:
    assert sent(gateway, f"POST {INFER} HTTP/1.1\r\n{head}", b"{}").startswith(f"HTTP/1.1 {status} ")


@pytest.mark.usefixtures("unharmed")
def test_a_body_larger_than_it_says_is_refused(gateway: Gateway) -> None:
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = sent(gateway, f"POST {INFER} HTTP/1.1\r\nTransfer-Encoding: chunked", *[chunk] * 70)
    assert answer == "" or answer.startswith("HTTP/1.1 413 ")


def tensor(**other: Any) -> dict[str, Any]:
    """A body for a text, with other fields in its input."""
    return {"inputs": [{**RIGHT["inputs"][0], **other}]}


NOT_VALID = {
    "nothing": b"{}",
    "no JSON": b"{",
    "a list": b"[]",
    "a name that is a number": tensor(name=1),
    "a negative shape": tensor(shape=[-1, 1]),
    "a number for a text": tensor(data=[1]),
    "null for a text": tensor(data=[None]),
    "a negative size": tensor(parameters={"binary_data_size": -5}),
    "no shape": tensor(shape="x"),
    "inputs of another kind": {"inputs": {}},
    "outputs of another kind": {**RIGHT, "outputs": 1},
    "an id of another kind": {**RIGHT, "id": 1},
    "parameters of another kind": {**RIGHT, "parameters": [1]},
    "a negative priority": {**RIGHT, "parameters": {"priority": -1}},
    "a classification of another kind": {
        **RIGHT, "outputs": [{"name": "vector", "parameters": {"classification": "x"}}]
    },
}  # fmt: skip
"""Requests that are not KServe's; Triton answers 500 to some."""


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("what", NOT_VALID)
def test_requests_of_another_protocol_are_the_clients_fault(what: str, gateway: Gateway) -> None:
    body = NOT_VALID[what]
    with gateway.client() as client:
        answer = client.post(INFER, content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]


CLOSED = {
    "POST /v2/repository/index": {},
    f"POST /v2/repository/models/{NAME}_text/load": {},
    f"POST /v2/repository/models/{NAME}_text/unload": {},
    "POST /v2/systemsharedmemory/region/a/register": {"key": "/a", "offset": 0, "byte_size": 8},
    "GET /v2/systemsharedmemory/status": None,
    "GET /v2/cudasharedmemory/status": None,
    "POST /v2/logging": {"log_file": "/tmp/x"},
    "GET /v2/logging": None,
    "POST /v2/trace/setting": {"trace_file": "/tmp/x"},
    f"GET /v2/models/{NAME}_text/trace/setting": None,
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("request_", CLOSED)
def test_what_changes_the_server_is_closed_over_http(request_: str, gateway: Gateway) -> None:
    method, _, path = request_.partition(" ")
    for way in (
        path,
        path.replace("/v2/", "/v2//"),
        path.replace("/v2/", "/v2/./"),
        path.replace("v2", "%762"),
    ):
        with gateway.client() as client:
            answer = client.request(method, way, json=CLOSED[request_])
        assert answer.status_code in (400, 403, 404, 405), (way, answer.text)


@pytest.mark.usefixtures("unharmed")
def test_what_changes_the_server_is_closed_over_grpc(gateway: Gateway) -> None:
    assert gateway.server is not None
    client = tritonclient.grpc.InferenceServerClient(gateway.grpc)
    headers = {"triton-grpc-protocol-authorization": f"Bearer {gateway.token}"}
    for call in (
        lambda: client.load_model(f"{NAME}_text", headers=headers),
        lambda: client.unload_model(f"{NAME}_text", headers=headers),
        lambda: client.get_model_repository_index(headers=headers),
        lambda: client.register_system_shared_memory("a", "/a", 8, headers=headers),
        lambda: client.update_log_settings({"log_verbose_level": 1}, headers=headers),
        lambda: client.update_trace_settings(settings={"trace_level": "OFF"}, headers=headers),
    ):
        with pytest.raises(InferenceServerException, match="restricted"):
            call()


def test_only_its_owner_reaches_the_server_behind_the_gateway(gateway: Gateway) -> None:
    """Whatever the server's command line says, which every user of the machine can read."""
    assert gateway.server is not None
    addresses = gateway.server.addresses
    sockets = [addresses.http] + ([addresses.grpc] if gateway.token else [])
    for address in sockets:
        path = Path(address.removeprefix("unix:"))
        assert path.is_socket()
        assert path.parent.stat().st_mode & 0o077 == 0
    command = Path(f"/proc/{gateway.server.pid}/cmdline").read_bytes()
    assert gateway.token is None or gateway.token.encode() not in command


@pytest.mark.usefixtures("unharmed")
def test_no_header_opens_what_is_closed_over_grpc(gateway: Gateway) -> None:
    """Triton's command line names a header; gRPC sends no name with a letter in upper case."""
    assert gateway.server is not None
    command = Path(f"/proc/{gateway.server.pid}/cmdline").read_text().split("\0")
    (option,) = [word for word in command if word.startswith("--grpc-restricted-protocol=")]
    name, _, value = option.rpartition(":")[2].partition("=")
    target = gateway.server.addresses.grpc
    token = {"triton-grpc-protocol-authorization": f"Bearer {gateway.token}"}
    for given in (name, name.lower()):
        client = tritonclient.grpc.InferenceServerClient(target)
        with pytest.raises(InferenceServerException, match=r"restricted|Invalid metadata"):
            client.get_log_settings(headers={**token, f"triton-grpc-protocol-{given}": value})


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("n_bytes", [7 << 20, 200 << 20])
def test_large_grpc_messages_are_refused_before_they_are_taken(n_bytes: int, guarded: Gateway) -> None:
    assert guarded.server is not None
    client = tritonclient.grpc.InferenceServerClient(guarded.grpc)
    asked = {"text": bytes_column([b"x" * n_bytes])}
    before = memory_bytes(guarded.server.pid)
    with pytest.raises(InferenceServerException, match="larger than max"):
        infer(client, tritonclient.grpc, f"{NAME}_text", asked, headers=bearer(guarded))
    assert memory_bytes(guarded.server.pid) - before < MOST_BYTES


@pytest.mark.usefixtures("unharmed")
def test_compressed_grpc_messages_are_refused(guarded: Gateway) -> None:
    """A few bytes could hold gigabytes."""
    client = tritonclient.grpc.InferenceServerClient(guarded.grpc)
    asked = {"text": bytes_column([b"x" * 10_000])}
    with pytest.raises(InferenceServerException, match=r"[Cc]ompression algorithm 'gzip' is disabled"):
        infer(
            client, tritonclient.grpc, f"{NAME}_text", asked,
            headers=bearer(guarded), compression_algorithm="gzip",
        )  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-token-0123456789"},
        {"authorization": f"Basic {TOKEN}"},
        {"triton-grpc-protocol-authorization": TOKEN},
        {"authorization": f"Bearer {TOKEN}", "triton-grpc-protocol-authorization": "Bearer wrong"},
    ],
    ids=["none", "wrong", "basic", "bare", "two"],
)
def test_strangers_are_told_so_over_grpc_too(headers: dict[str, str], guarded: Gateway) -> None:
    client = tritonclient.grpc.InferenceServerClient(guarded.grpc)
    for call in (
        lambda: infer(
            client, tritonclient.grpc, f"{NAME}_text", {"text": bytes_column(["a"])}, headers=headers
        ),
        lambda: client.get_model_config(f"{NAME}_text", headers=headers),
        lambda: client.get_server_metadata(headers=headers),
    ):
        with pytest.raises(InferenceServerException) as failure:
            call()
        assert failure.value.status() == "StatusCode.UNAUTHENTICATED"
        assert TOKEN not in str(failure.value)
    assert client.is_server_live()
    assert client.is_server_ready()


def test_grpc_streams_pass_and_unknown_methods_do_not(guarded: Gateway, expected: np.ndarray) -> None:
    client = tritonclient.grpc.InferenceServerClient(guarded.grpc)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=bearer(guarded))
    text = tritonclient.grpc.InferInput("text", [1, 1], "BYTES")
    text.set_data_from_numpy(bytes_column(["um gato"]))
    client.async_stream_infer(f"{NAME}_text", [text])
    found = answers.get(timeout=60)
    client.stop_stream()
    np.testing.assert_allclose(found.as_numpy("vector"), expected, rtol=0, atol=1e-6)
    with grpc.insecure_channel(guarded.grpc) as channel:
        for method in ("/inference.GRPCInferenceService/Nothing", "/other.Service/ModelInfer"):
            with pytest.raises(grpc.RpcError) as failure:
                channel.unary_unary(method)(b"", metadata=tuple(bearer(guarded).items()))
            assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_slow_grpc_message_is_given_up(exported: Exported, server_environment: ServerEnvironment) -> None:
    """A sender who never sends what it began."""
    door = Door("127.0.0.1", 0, GatewayOptions(TOKEN, body_s=0.5))
    options = ServerOptions(security=Security(TOKEN, guarded=True))
    with (
        running_server(exported(NAME).parent, environment=server_environment, options=options) as server,
        guarded_server(door, server, [NAME], http_api=False) as reached,
        grpc.insecure_channel(reached.grpc) as channel,
    ):
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        done = threading.Event()

        def nothing() -> Iterator[bytes]:
            done.wait(60)
            yield from ()

        with pytest.raises(grpc.RpcError, match="did not arrive in time"):
            call(nothing(), metadata=(("authorization", f"Bearer {TOKEN}"),))
        done.set()


@pytest.mark.usefixtures("unharmed")
def test_raw_clients_get_their_vectors(gateway: Gateway, expected: np.ndarray) -> None:
    assert gateway.server is not None
    bearer = f"Bearer {gateway.token}"
    http = tritonclient.http.InferenceServerClient(gateway.url.removeprefix("http://"))
    grpc = tritonclient.grpc.InferenceServerClient(gateway.grpc)
    for client, module, headers in (
        (http, tritonclient.http, {"authorization": bearer}),
        (grpc, tritonclient.grpc, {"triton-grpc-protocol-authorization": bearer}),
    ):
        asked = {"text": bytes_column(["um gato"])}
        answer = infer(client, module, f"{NAME}_text", asked, headers=headers)
        np.testing.assert_allclose(answer.as_numpy("vector"), expected, rtol=0, atol=1e-6)
    http.close()


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong-token-0123456789", f"Basic {TOKEN}", TOKEN]
)
def test_strangers_are_told_so(given: str | None, gateway: Gateway) -> None:
    if gateway.token is None:
        pytest.skip("everybody may ask")
    headers = {} if given is None else {"authorization": given}
    with httpx.Client(base_url=gateway.url, headers=headers, trust_env=False) as client:
        for path in ("/v1/models", "/v2/models/x/config", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"
        assert client.get("/health").status_code == 200
        assert client.get("/v2/health/ready").status_code == 200


def test_metrics_are_of_the_gateway_and_the_server(gateway: Gateway) -> None:
    with gateway.client() as client:
        client.post("/v1/embeddings", json={"model": NAME, "input": ["a", "b"]})
        client.post("/v1/embeddings", json={"model": "nobody", "input": ["a"]})
        page = client.get("/metrics").text
    assert re.search(r'babeltower_gateway_inputs_total\{kind="text",model="capivara"\} [1-9]', page)
    assert re.search(r'gateway_requests_total\{route="/v1/embeddings",status="404"\} [1-9]', page)
    assert re.search(r'nv_inference_request_success\{model="capivara_text"', page)


BAD_BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "JSON"),
    "no object": (b"[]", "object"),
    "no model": ({"input": "a"}, "model: Field required"),
    "unknown model": ({"model": "x", "input": "a"}, "There is no model 'x'"),
    "no input": ({"model": NAME}, "input: Field required"),
    "null": ({"model": NAME, "input": None}, "input 0 is of type NoneType"),
    "empty list": ({"model": NAME, "input": []}, "input is empty"),
    "empty text": ({"model": NAME, "input": ["a", " \n"]}, "input 1 is an empty text"),
    "token ids": ({"model": NAME, "input": [[1, 2]]}, "list of token ids"),
    "flag": ({"model": NAME, "input": [True]}, "input 0 is of type bool"),
    "object": ({"model": NAME, "input": [{"txt": "a"}]}, "is an object with"),
    "both": ({"model": NAME, "input": [{"text": "a", "image": "AAAA"}]}, "is an object with"),
    "long text": ({"model": NAME, "input": "x" * 16_385}, "16385 characters; the limit is 16384"),
    "long texts": (
        {"model": NAME, "input": ["x" * 16_000] * 70}, "70 texts .* 1120000 characters; the limit is 1048576"
    ),
    "many": ({"model": NAME, "input": ["x"] * 2_049}, "2049 inputs; the limit is 2048"),
    "unknown field": ({"model": NAME, "input": "a", "inputs": "b"}, "inputs: Extra inputs"),
    "encoding": ({"model": NAME, "input": "a", "encoding_format": "int8"}, "'float' or 'base64'"),
    "dimensions": ({"model": NAME, "input": "a", "dimensions": 7}, "no vectors of width 7"),
    "dimensions text": ({"model": NAME, "input": "a", "dimensions": "128"}, "dimensions: Input should be"),
    "languages": ({"model": NAME, "input": ["a"], "language": ["pt", "pt"]}, "2 codes for 1 inputs"),
    "language kind": ({"model": NAME, "input": ["a"], "language": 1}, "neither a code"),
    "no language": ({"model": MODELS[1], "input": ["a"]}, 'Text 0: .*needs the language.*"language": "pt"'),
    "bad language": (
        {"model": MODELS[1], "input": ["a", "b"], "language": ["pt", "xx"]}, "Text 1: .*'xx'"
    ),
    "surrogate": (b'{"model": "capivara", "input": "\\ud800"}', "Invalid JSON"),
    "image URL": (
        {"model": NAME, "input": "https://x/y.png", "modality": "image"}, "which is not fetched"
    ),
    "no base64": ({"model": NAME, "input": "data:image/png;base64,!"}, "not valid base64"),
    "another data URL": ({"model": NAME, "input": "data:text/plain;base64,AAAA"}, "not of an image"),
    "a data URL in capitals": ({"model": NAME, "input": "DATA:IMAGE/PNG;BASE64,AAAA"}, "Image 0"),
    "a long name": ({"model": "x" * 1_000_000, "input": "a"}, "x … x"),
    "no data URL": ({"model": NAME, "input": "data:image/png,AAAA"}, "is no data URL"),
    "capitals and percent": ({"model": NAME, "input": "DATA:image/PNG,%89PNG"}, "no data URL in base64"),
    "blanks": ({"model": NAME, "input": " \n\ufeffData:Image/png;base64,AAAA"}, "Image 0"),
    "parameters": (
        {"model": NAME, "input": 'data:image/svg+xml;charset=utf-8;name="a";Base64,AAAA'}, "Image 0"
    ),
    "a large image": ({"model": NAME, "input": [{"image": "A" * 8_590_000}]}, "an image of 6442500 bytes"),
    "a long language": ({"model": NAME, "input": "a", "language": "a" * 1_000_000}, "has 1000000 characters"),
    "no comma": ({"model": NAME, "input": "data:image/png;base64"}, "is no data URL"),
    "data of no type": ({"model": NAME, "input": "DATA:;base64,AAAA"}, "not of an image"),
    "data of text": ({"model": NAME, "input": "Data:text/html;charset=utf-8,<b>"}, "not of an image"),
    "URL in capitals": ({"model": NAME, "input": [{"image": " HTTP://x/y.png"}]}, "which is not fetched"),
    "URL of a file": ({"model": NAME, "input": [{"image": "file:///etc/x.png"}]}, "which is not fetched"),
    "other data as image": ({"model": NAME, "input": [{"image": "DATA:text/a;base64,AA=="}]}, "is no data"),
    "no image": ({"model": NAME, "input": ["a", {"image": "AAAA"}]}, "Image 1: .*format is unknown"),
}  # fmt: skip


UNKNOWN = ("unknown model", "a long name")


@pytest.mark.parametrize("what", BAD_BODIES)
def test_bad_requests_are_told_why(what: str, gateway: Gateway) -> None:
    body, reason = BAD_BODIES[what]
    with gateway.client() as client:
        answer = client.post(
            "/v1/embeddings", content=body if isinstance(body, bytes) else json.dumps(body).encode()
        )
    assert answer.status_code == (404 if what in UNKNOWN else 400), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(reason, error["message"]), error["message"]


def test_the_gateway_of_this_process_says_the_same(exported: Exported) -> None:
    (repository,) = {exported(name).parent for name in MODELS}
    with gateway_of_process(repository) as gateway, gateway.client() as client:
        for what, (body, reason) in BAD_BODIES.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post("/v1/embeddings", content=content)
            assert answer.status_code == (404 if what in UNKNOWN else 400), (what, answer.text)
            message = answer.json()["error"]["message"].replace("Image 1 of the request", "Image 1: ")
            assert re.search(reason, message), (what, message)


def test_bodies_that_wait_are_bounded_together(exported: Exported) -> None:
    """A sender that holds half a body leaves no room for another; when it leaves, there is room again."""
    options = GatewayOptions(max_body_bytes=1_000, max_waiting_bytes=1_500)
    with gateway_of_process(exported(NAME).parent, options=options) as gateway, gateway.client() as client:
        host, _, port = gateway.url.removeprefix("http://").rpartition(":")
        right = {"model": NAME, "input": "um gato" + " " * 300}
        with socket.create_connection((host, int(port))) as holding:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n"
            holding.sendall(head.encode() + b" " * 800)
            statuses = set()
            while 503 not in statuses:  # until the gateway has read the half body
                answer = client.post("/v1/embeddings", json=right)
                statuses.add(answer.status_code)
            assert answer.headers["retry-after"] == "1"
        while client.post("/v1/embeddings", json=right).status_code != 200:
            pass


def test_a_slow_body_is_given_up(exported: Exported) -> None:
    options = GatewayOptions(body_s=0.2)
    with gateway_of_process(exported(NAME).parent, options=options) as gateway:
        answer = sent(gateway, "POST /v1/embeddings HTTP/1.1\r\nContent-Length: 9", b"{")
        assert answer.startswith("HTTP/1.1 408 ")


def test_a_failed_start_is_one_error(exported: Exported) -> None:
    from runtime.commands.doors import Door, running_door
    from runtime.errors import ServerError
    from runtime.gateway.models import remote_opener
    from runtime.remote import Connection, address_from_text

    away = remote_opener(
        address_from_text("grpc://127.0.0.1:1/capivara"), Connection(timeout_s=5, retry_for_s=0)
    )
    with (
        pytest.raises(ServerError, match="is not available"),
        running_door(Door("127.0.0.1", 0, GatewayOptions()), [away]),
    ):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(EngineError, match="cannot be used"),
            running_door(Door("127.0.0.1", taken.getsockname()[1], GatewayOptions()), []),
        ):
            pass


def test_senders_that_leave_are_not_computed() -> None:
    import asyncio

    from runtime.gateway.batching import BatchingQueue

    started, goes_on = threading.Event(), threading.Event()
    computed: list[int] = []

    def run(rows: Any, dim: int) -> np.ndarray:
        started.set()
        goes_on.wait()
        computed.extend(rows)
        return np.zeros((len(rows), dim), np.float32)

    async def asked() -> None:
        queue: BatchingQueue[int] = BatchingQueue(run, max_rows=8)
        tasks = [asyncio.ensure_future(queue.vectors([number], 4)) for number in range(4)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        late = asyncio.ensure_future(queue.vectors([9], 4))
        await asyncio.sleep(0)
        late.cancel()
        kept = asyncio.ensure_future(queue.vectors([10], 4))
        await asyncio.sleep(0)
        goes_on.set()
        assert (await kept).shape == (1, 4)
        await asyncio.gather(*tasks)
        await queue.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, asked()).result(60)
    assert 9 not in computed
    assert {0, 1, 2, 3, 10} <= set(computed)


def test_the_description_is_valid_and_names_every_path(exported: Exported) -> None:
    with gateway_of_process(exported(NAME).parent) as gateway, gateway.client() as client:
        document = client.get("/openapi.json").json()
        page = client.get("/docs").text
        assert document["openapi"].startswith("3.1")
        for path in document["paths"]:
            assert f" {path}</h2>" in page
        assert "<script" not in page
        schema = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]
        assert set(schema["schema"]["properties"]) >= {"model", "input", "dimensions", "language", "modality"}
