"""What a request must pass before a route sees it: the token, and the size and structure of its body."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.gateway.failures import IMMICH_PATH, GatewayError, response_of_error
from runtime.gateway.memory import MemoryTrim
from runtime.gateway.nesting import JsonStructure
from runtime.gateway.options import GatewayOptions
from runtime.remote.options import is_bearer

__all__ = ["HEAD", "OPEN_PATHS", "Guard", "body_of_request"]

OPEN_PATHS = frozenset({"/health", "/v2/health/live", "/v2/health/ready", "/ping"})
"""Paths that need no token: probes of load balancers have none."""

HEAD = "inference-header-content-length"
"""Header of KServe's binary format: size of the JSON before the tensors."""

_BODY = "babeltower.body"
_MOST_DIGITS = 18
_MOST_VALUES, _MOST_TENSOR_VALUES = 1 << 16, 1 << 18
"""Values of JSON of ``/v1``, where 2,048 inputs take a fifth of them, and of ``/v2``, with small tensors."""


def body_of_request(request: Request) -> bytes:
    """Take the body of a request that the guard let in: nobody else keeps it."""
    body: bytes = request.scope.pop(_BODY)
    return body


class Guard:
    """ASGI middleware that refuses strangers and large bodies; the routes get each body as a whole."""

    def __init__(self, app: ASGIApp, options: GatewayOptions) -> None:
        self._app = app
        self._options = options
        self._token = (options.token or "").encode()
        self._waiting_bytes = 0
        self._n_running = 0
        self._trim = MemoryTrim()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held(self)
        is_running = False
        try:
            try:
                self._require_token(scope)
                scope[_BODY] = await self._body(scope, receive, held)
                is_running = self._begin(scope)
            except GatewayError as error:
                await response_of_error(error, scope["path"])(scope, receive, send)
                return
            await self._app(scope, receive, send)
        finally:
            self._n_running -= is_running
            scope.pop(_BODY, None)
            self._trim.note_released(held.n_bytes)
            held.release()

    def take(self, n_bytes: int) -> None:
        """Count memory of a request.

        Raises:
            GatewayError: all requests take too much together.
        """
        if self._waiting_bytes + n_bytes > self._options.max_waiting_bytes:
            raise GatewayError(
                503, "Too many large requests are being answered. Try again later.", code="overloaded"
            )
        self._waiting_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Stop counting memory of a request."""
        self._waiting_bytes -= n_bytes

    def _require_token(self, scope: Scope) -> None:
        if not self._token or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            reason = "no token" if not given else "several tokens"
            raise GatewayError(
                401, f"The request has {reason}. Send it as: Authorization: Bearer TOKEN", code="no_api_key"
            )
        if not is_bearer(given[0], self._token):
            raise GatewayError(401, "The request's token is not the server's.", code="invalid_api_key")

    def _begin(self, scope: Scope) -> bool:
        """Count a request that is now answered; those for health are not counted."""
        if scope["path"] in OPEN_PATHS:
            return False
        if self._n_running >= self._options.max_running:
            raise GatewayError(
                503, "Too many requests are being answered. Try again later.", code="overloaded"
            )
        self._n_running += 1
        return True

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        headers = _Headers(scope)
        headers.require_plain()
        counted = self._bounds(scope, headers)
        headers.require_at_most(counted.limit)
        body = io.BytesIO()  # whose value is no copy
        deadline = asyncio.get_running_loop().time() + self._options.body_s
        while True:
            message = await _within(receive, deadline)
            if message["type"] == "http.disconnect":
                raise GatewayError(400, "The sender left before the body was complete.")
            if part := message.get("body", b""):
                counted.add(part, held.take)
                body.write(part)
            if not message.get("more_body", False):
                return body.getvalue()

    def _bounds(self, scope: Scope, headers: _Headers) -> _BodyBounds:
        """Return the bounds of a body, by its path.

        Raises:
            GatewayError: the size of the JSON in it is not valid, or too large.
        """
        options = self._options
        if scope["path"] == IMMICH_PATH:  # an image, which its form's reader copies, and a few short fields
            return _BodyBounds(options.max_body_bytes, 0, 0, n_copies=2)
        if not scope["path"].startswith("/v2"):
            limit = options.max_image_json_bytes
            return _BodyBounds(limit, limit, _MOST_VALUES)
        json_limit = min(options.max_json_bytes, options.max_body_bytes)
        head = headers.only(HEAD.encode())
        if head is None:
            return _BodyBounds(json_limit, json_limit, _MOST_TENSOR_VALUES)
        if not head.isdigit():
            raise GatewayError(400, f"{HEAD} is {head.decode('latin-1')!r}; expected a number of bytes.")
        if len(head) > _MOST_DIGITS or int(head) > json_limit:
            raise _too_large(json_limit, "JSON of the body")
        return _BodyBounds(options.max_body_bytes, int(head), _MOST_TENSOR_VALUES)


class _Headers:
    """Headers that say how a body is sent."""

    def __init__(self, scope: Scope) -> None:
        self._headers = scope["headers"]

    def all(self, name: bytes) -> list[bytes]:
        """Return the values of a header."""
        return [value.strip().lower() for key, value in self._headers if key == name]

    def only(self, name: bytes) -> bytes | None:
        """Return the value of a header that may be there once.

        Raises:
            GatewayError: it is there several times.
        """
        values = self.all(name)
        if len(values) > 1:
            raise GatewayError(400, f"The request has several headers {name.decode()}.")
        return values[0] if values else None

    def require_plain(self) -> None:
        """Check that a body is sent as it is, in one piece or in chunks.

        Raises:
            GatewayError: it is compressed, or coded in another way.
        """
        if any(value not in (b"", b"identity") for value in self.all(b"content-encoding")):
            raise GatewayError(415, "The body is compressed. Send it as it is.", code="compressed")
        if any(value != b"chunked" for value in self.all(b"transfer-encoding")):
            raise GatewayError(
                501,
                "The body's transfer coding is not known. Send it as it is, or chunked.",
                code="compressed",
            )

    def require_at_most(self, limit: int) -> None:
        """Check the size that a body has by its header.

        Raises:
            GatewayError: it is too large.
        """
        declared = self.only(b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > _MOST_DIGITS or int(declared) > limit:
            raise _too_large(limit)


class _BodyBounds:
    """Size of a body, and structure of the JSON that it begins with."""

    def __init__(self, limit: int, json_bytes: int, max_values: int, *, n_copies: int = 1) -> None:
        self.limit = limit
        self._n_copies = n_copies
        self._json_left = json_bytes
        self._structure = JsonStructure(max_values)
        self._n_bytes = 0

    def add(self, part: bytes, take: Callable[[int], None]) -> None:
        """Count a part, and take memory for it and for what is parsed from it.

        Raises:
            GatewayError: the body is too large, or its JSON too deep or of too many values.
        """
        self._n_bytes += len(part)
        if self._n_bytes > self.limit:
            raise _too_large(self.limit)
        before = self._structure.memory_bytes
        if self._json_left:
            self._structure.add(part[: self._json_left])
            self._json_left = max(0, self._json_left - len(part))
        take(self._n_copies * len(part) + self._structure.memory_bytes - before)


class _Held:
    """Bytes that one request holds."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.n_bytes = 0

    def take(self, n_bytes: int) -> None:
        """Hold more; errors as of ``Guard.take``."""
        self._guard.take(n_bytes)
        self.n_bytes += n_bytes

    def release(self) -> None:
        """Hold none any more."""
        self._guard.give_back(self.n_bytes)
        self.n_bytes = 0


async def _within(receive: Receive, deadline: float) -> Message:
    try:
        left = deadline - asyncio.get_running_loop().time()
        return await asyncio.wait_for(receive(), max(0.0, left))
    except asyncio.TimeoutError:
        raise GatewayError(408, "The body did not arrive in time.", code="timeout") from None


def _too_large(limit: int, what: str = "body") -> GatewayError:
    return GatewayError(
        413,
        f"The {what} exceeds the limit of {limit} bytes. Send fewer inputs in a request.",
        code="too_large",
    )
