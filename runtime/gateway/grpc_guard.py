"""gRPC in front of a Triton server: the token and the size of a message are checked before Triton sees it.

Triton 24.10 takes messages of any size from anybody, and its token from the command line, which other users
of the machine can read. Messages pass as bytes; nothing of them is parsed here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from runtime.errors import EngineError
from runtime.gateway.options import GatewayOptions
from runtime.remote.options import TRITON_GRPC_PREFIX, is_bearer
from runtime.remote.transport import GRPC_OPTIONS

__all__ = ["running_grpc_guard"]

_SERVICE = "/inference.GRPCInferenceService/"
_STREAM = f"{_SERVICE}ModelStreamInfer"
_OPEN = frozenset(f"{_SERVICE}{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))
"""Methods that need no token: probes of load balancers have none."""
_HEADERS = ("authorization", f"{TRITON_GRPC_PREFIX}authorization")
_MOST_ARRIVING = 32
"""Requests whose message is being received."""
_STOP_S = 5.0
_IDENTITY_ONLY = 1
"""A compressed message of the allowed size may hold a thousand times as much."""


@contextlib.asynccontextmanager
async def running_grpc_guard(
    upstream: str, host: str, port: int, options: GatewayOptions
) -> AsyncIterator[int]:
    """Answer gRPC on a port with what an upstream server answers; yields the port.

    Args:
        upstream: gRPC target of the server, which only this process should reach.
        port: 0 picks a free one.

    Raises:
        EngineError: the port cannot be used.
    """
    async with grpc.aio.insecure_channel(
        upstream, options=[*GRPC_OPTIONS, ("grpc.enable_http_proxy", 0)]
    ) as channel:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=options.max_running,
        )
        server.add_generic_rpc_handlers((_Forwarding(channel, options),))
        try:
            bound = _bound(server, f"{host}:{port}", options)
        except RuntimeError:
            raise EngineError(
                f"Port {port} of {host} cannot be used for gRPC. Choose another port."
            ) from None
        await server.start()
        try:
            yield bound
        finally:
            await server.stop(_STOP_S)


def _bound(server: grpc.aio.Server, address: str, options: GatewayOptions) -> int:
    if options.certificate is None or options.key is None:
        return int(server.add_insecure_port(address))
    pair = (options.key.read_bytes(), options.certificate.read_bytes())
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([pair])))


class _Forwarding(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Handler of every method; those of strangers are refused before their message is read."""

    def __init__(self, channel: grpc.aio.Channel, options: GatewayOptions) -> None:
        self._channel = channel
        self._options = options
        self._token = (options.token or "").encode()
        self._arriving = asyncio.Semaphore(_MOST_ARRIVING)
        self._n_bytes = 0

    def service(self, details: Any) -> Any:
        """Return the behaviour of a request."""
        if not details.method.startswith(_SERVICE):
            return None
        reason = "" if details.method in _OPEN else self._refusal(details.invocation_metadata)
        if reason:
            return grpc.stream_stream_rpc_method_handler(_refusing(reason))
        if details.method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._streamed)
        return grpc.stream_stream_rpc_method_handler(self._forwarding(details.method))

    def _refusal(self, metadata: Any) -> str:
        """Return why a request may not pass; nothing if it may."""
        if not self._token:
            return ""
        given = [value for name, value in metadata if name in _HEADERS]
        if not given:
            return "The request has no token. Send it as metadata: authorization: Bearer TOKEN"
        if not all(isinstance(value, str) and is_bearer(value.encode(), self._token) for value in given):
            return "The request's token is not the server's."
        return ""

    def _forwarding(self, method: str) -> Any:
        call = self._channel.unary_unary(method)

        async def forwarded(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            message = await self._received(messages, context)
            with self._held(message) as is_held:
                if not is_held:
                    await context.abort(
                        grpc.StatusCode.UNAVAILABLE,
                        "Too many large requests are being answered. Try again later.",
                    )
                try:
                    answer = await call(message, timeout=context.time_remaining())
                except grpc.aio.AioRpcError as error:
                    await context.abort(error.code(), error.details() or "")
            yield answer

        return forwarded

    async def _received(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async with self._arriving:
            try:
                return await asyncio.wait_for(anext(messages), self._options.body_s)
            except (asyncio.TimeoutError, StopAsyncIteration):
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED, "The request's message did not arrive in time."
                )
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _held(self, message: bytes) -> Any:
        """Count a message among those of all requests; yields whether there is room for it."""
        is_held = self._n_bytes + len(message) <= self._options.max_waiting_bytes
        self._n_bytes += len(message)
        try:
            yield is_held
        finally:
            self._n_bytes -= len(message)

    async def _streamed(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        call = self._channel.stream_stream(_STREAM)(messages, timeout=context.time_remaining())
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")


def _refusing(reason: str) -> Any:
    async def refused(_: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        yield b""  # a generator, as every behaviour here

    return refused
