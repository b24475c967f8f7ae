"""What a request must pass before a route sees it: the token, and the size of its body."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.gateway.failures import GatewayError, response_of_error
from runtime.gateway.options import GatewayOptions

__all__ = ["OPEN_PATHS", "Guard"]

OPEN_PATHS = frozenset({"/health", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: probes of load balancers have none."""


class Guard:
    """ASGI middleware that refuses strangers and large bodies; the routes get each body as a whole."""

    def __init__(self, app: ASGIApp, options: GatewayOptions) -> None:
        self._app = app
        self._options = options
        self._token = (options.token or "").encode()
        self._waiting_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held(self)
        try:
            try:
                self._require_token(scope)
                body = await self._body(scope, receive, held)
            except GatewayError as error:
                await response_of_error(error, scope["path"])(scope, receive, send)
                return
            await self._app(scope, _receiving(body, receive), send)
        finally:
            held.release()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the bodies of all requests being answered."""
        return self._waiting_bytes

    def take(self, n_bytes: int) -> None:
        """Count bytes of a body.

        Raises:
            GatewayError: the bodies of all requests are too large together.
        """
        if self._waiting_bytes + n_bytes > self._options.max_waiting_bytes:
            raise GatewayError(
                503, "Too many large requests are being answered. Try again later.", code="overloaded"
            )
        self._waiting_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Stop counting bytes of a body."""
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
        scheme, _, token = given[0].partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise GatewayError(401, "The request's token is not the server's.", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        limit = self._options.max_body_bytes
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise GatewayError(415, "The body is compressed. Send it as it is.", code="compressed")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        deadline = asyncio.get_running_loop().time() + self._options.body_s
        while True:
            message = await _within(receive, deadline)
            if message["type"] == "http.disconnect":
                raise GatewayError(400, "The sender left before the body was complete.")
            if part := message.get("body", b""):
                if held.n_bytes + len(part) > limit:
                    raise _too_large(limit)
                held.take(len(part))
                parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


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


def _too_large(limit: int) -> GatewayError:
    return GatewayError(
        413, f"The body exceeds the limit of {limit} bytes. Send fewer inputs in a request.", code="too_large"
    )


def _receiving(body: bytes, receive: Receive) -> Receive:
    """Return the body in one message, then what the connection tells."""
    pending = [body]

    async def received() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return received
