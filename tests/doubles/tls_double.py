"""The double behind TLS, over gRPC and HTTPS, for those who carry its token."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from aiohttp import web
from google.protobuf import json_format
from server_double import Double, vector_of
from tritonclient.grpc import service_pb2_grpc

TOKEN = "open-sesame"


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the tests, and a certificate that it signed for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


def expired(own: Authority, folder: Path) -> Path:
    """A certificate of the same key, whose time is over."""
    folder.mkdir()
    settings = ("database = index.txt", "new_certs_dir = .", "rand_serial = yes", "default_md = sha256")
    (folder / "config").write_text(
        "\n".join(
            ["[ca]", "default_ca = d", "[d]", *settings, "policy = p", "[p]", "commonName = supplied", ""]
        )
    )
    (folder / "index.txt").touch()
    ask = ("req", "-new", "-key", str(own.key), "-subj", "/CN=127.0.0.1", "-out", "asked")
    times = ("-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
    sign = ("ca", "-selfsign", "-batch", "-config", "config", "-keyfile", str(own.key), *times)
    for words in (ask, (*sign, "-in", "asked", "-out", "expired.pem")):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    return folder / "expired.pem"


def authority(folder: Path) -> Authority:
    """Made by the ``openssl`` command."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *new,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-days",
        "2",
        "-subj",
        "/CN=tests",
        "-addext",
        "keyUsage=critical,keyCertSign",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
    )
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "names",
        "-out",
        "server.pem",
    )
    return Authority(folder / "ca.pem", folder / "server.pem", folder / "server.key")


class _Guard(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets nobody in without the token."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        if ("authorization", f"Bearer {TOKEN}") in details.invocation_metadata:
            return continuation(details)

        def refuse(_: Any, context: Any) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextmanager
def grpc_double(own: Authority, *, clients: Authority | None = None) -> Iterator[str]:
    """Address of a double over gRPC and TLS; ``clients`` signs certificates that clients must have."""
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[_Guard()])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Double(), server)
    pair = (own.key.read_bytes(), own.certificate.read_bytes())
    signed_by = None if clients is None else clients.ca.read_bytes()
    credentials = grpc.ssl_server_credentials([pair], signed_by, require_client_auth=clients is not None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}/double"
    finally:
        server.stop(grace=None).wait()


@contextmanager
def https_double(own: Authority, *, clients: Authority | None = None) -> Iterator[str]:
    """Address of a double over HTTPS; ``clients`` as of ``grpc_double``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)
    if clients is not None:
        context.load_verify_locations(clients.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    application = web.Application(middlewares=[_guarded])
    application.router.add_get("/v2/models/{model}/config", _config)
    application.router.add_post("/v2/models/{model}/infer", _infer)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def started() -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(started(), loop).result()
    try:
        yield f"https://127.0.0.1:{port}/double"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)


@web.middleware
async def _guarded(request: web.Request, handler: Any) -> Any:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        return web.json_response({"error": "no valid token"}, status=401)
    return await handler(request)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


async def _config(request: web.Request) -> web.Response:
    config = Double().ModelConfig(_Named(request.match_info["model"]), None).config
    return web.json_response(json_format.MessageToDict(config, preserving_proto_field_name=True))


async def _infer(request: web.Request) -> web.Response:
    body = await request.read()
    n_head = int(request.headers["Inference-Header-Content-Length"])
    head = json.loads(body[:n_head])
    first = head["inputs"][0]["parameters"]["binary_data_size"]
    items, data = [], body[n_head : n_head + first]
    while data:
        (size,) = struct.unpack_from("<I", data)
        items.append(data[4 : 4 + size])
        data = data[4 + size :]
    vectors = np.stack([vector_of(item) for item in items]).tobytes()
    output = {
        "name": "vector", "datatype": "FP32", "shape": [len(items), len(vectors) // 4 // len(items)],
        "parameters": {"binary_data_size": len(vectors)},
    }  # fmt: skip
    answer = {"model_name": request.match_info["model"], "model_version": "1", "outputs": [output]}
    encoded = json.dumps(answer).encode()
    headers = {"Inference-Header-Content-Length": str(len(encoded))}
    return web.Response(body=encoded + vectors, headers=headers)
