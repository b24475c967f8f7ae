"""``/v2`` and ``/metrics`` of a Triton server behind the gateway.

Triton 24.10 ends on a body of many chunks and on deeply nested JSON. It gets each body in one piece, after
its size and its depth were checked; and only the headers that it knows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from runtime.gateway.embeddings import while_connected
from runtime.gateway.failures import GatewayError
from runtime.gateway.guard import HEAD, body_of_request
from runtime.gateway.metrics import GatewayMetrics
from runtime.gateway.options import TritonEndpoint
from runtime.remote.options import UNIX

__all__ = ["TritonRoutes"]

_FORWARDED = ("content-type", "accept", HEAD)
_RETURNED = ("content-type", HEAD)
_NOT_PARSED = re.compile(
    rb'\{"error":"(?:failed to parse|Unable to parse|[^"]{0,200}attempt to (?:access|get) )'
)
"""Start of Triton's answer to JSON that is not KServe's, which it takes for a fault of its own."""
_READY_PATH = "/v2/health/ready"
_LONGEST_ADDRESS = 4_096
"""Most characters of a path and its query; names of models and versions are much shorter."""
_ANSWER_S = 300.0
_PIECE_BYTES = 1 << 18


class TritonRoutes:
    """Routes that are answered by a Triton server; open it on the event loop that serves them."""

    def __init__(self, endpoint: TritonEndpoint, metrics: GatewayMetrics) -> None:
        self._endpoint = endpoint
        self._metrics = metrics
        http, is_socket = endpoint.http, endpoint.http.startswith(UNIX)
        self._url = "http://triton" if is_socket else f"http://{http}"
        self._http = _session(endpoint, http.removeprefix(UNIX) if is_socket else None)
        self._pages = _session(endpoint, None)

    async def forwarded(self, request: Request) -> Response:
        """Answer a request of KServe's protocol."""
        if request.url.path == _READY_PATH and not self._endpoint.is_healthy():
            raise GatewayError(503, "A model does not answer as it should; `babeltower ready` says which.")
        body = body_of_request(request)
        _require_head(body, request.headers.get(HEAD))
        path = request.url.path
        query = f"?{request.url.query}" if request.url.query else ""
        if len(path) + len(query) > _LONGEST_ADDRESS:  # Triton would end the connection without a word
            raise GatewayError(
                414, f"The address has {len(path) + len(query)} characters; the most is {_LONGEST_ADDRESS}."
            )
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        method = "GET" if request.method == "HEAD" else request.method  # Triton answers HEAD unreadably
        answer = await while_connected(
            request, _asked(self._http, method, f"{self._url}{path}{query}", body, headers)
        )
        if path == _READY_PATH:
            answer.headers["Babeltower-Health"] = "watched"  # `babeltower ready` believes it
        return answer

    async def metrics(self, _: Request) -> Response:
        """Answer ``GET /metrics``: the gateway's counters, then the server's."""
        answer = await _asked(self._pages, "GET", f"http://{self._endpoint.metrics}/metrics", b"", {})
        return Response(self._metrics.page() + bytes(answer.body), media_type="text/plain; version=0.0.4")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()
        await self._pages.close()


def _session(endpoint: TritonEndpoint, socket: str | None) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0) if socket is None else aiohttp.UnixConnector(socket, limit=0)
    return aiohttp.ClientSession(
        connector=connector,
        headers=endpoint.headers,
        timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
        skip_auto_headers=("Accept-Encoding",),
        trust_env=False,
    )


async def _asked(
    session: aiohttp.ClientSession, method: str, url: str, body: bytes, headers: dict[str, str]
) -> Response:
    content: bytes | AsyncIterator[memoryview] | None = body or None
    if len(body) > _PIECE_BYTES:  # else, the connection keeps copies of what it cannot send at once
        headers = {**headers, "content-length": str(len(body))}
        content = _pieces(body)
    try:
        async with session.request(
            method, url, data=content, headers=headers, allow_redirects=False
        ) as answer:
            returned = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
            page = await answer.read()
            is_their_fault = answer.status == 500 and _NOT_PARSED.match(page) is not None
            return Response(page, 400 if is_their_fault else answer.status, returned)
    except asyncio.TimeoutError:
        raise GatewayError(504, f"The server did not answer within {_ANSWER_S:.0f} s.") from None
    except aiohttp.ClientError as error:
        raise GatewayError(503, f"The server cannot be reached: {error}.") from None


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    """Yield a body in pieces, which are no chunks of HTTP, since its size is known."""
    whole = memoryview(body)
    for start in range(0, len(body), _PIECE_BYTES):
        yield whole[start : start + _PIECE_BYTES]


def _require_head(body: bytes, head: str | None) -> None:
    """Check the size of the JSON before the tensors, which the guard has bounded."""
    if head is not None and int(head) > len(body):
        raise GatewayError(400, f"{HEAD} is {head!r}; the body has {len(body)} bytes.")
