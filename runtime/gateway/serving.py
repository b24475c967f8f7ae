"""The gateway on a port of this machine, served by uvicorn on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from runtime.errors import BabeltowerError, EngineError
from runtime.gateway.options import GatewayOptions
from runtime.gateway.protocol import BoundedHttp

__all__ = ["require_free_port", "running_gateway"]

_STOP_S = 30
_KEEP_ALIVE_S = 75
_HANDSHAKE_S = 10.0


@contextlib.contextmanager
def running_gateway(app: ASGIApp, host: str, port: int, options: GatewayOptions) -> Iterator[str]:
    """Serve an application; running requests are answered before it ends.

    Yields:
        ``HOST:PORT``; port 0 picks a free one.

    Raises:
        EngineError: the port cannot be used, or the certificate and key are not valid.
        BabeltowerError: a model cannot be opened.
    """
    failures: list[BaseException] = []
    with _listening(host, port) as listener:
        server = _Server(_config(_noting(app, failures), options), failures)
        thread = threading.Thread(target=server.run_on, args=(listener,), name="babeltower-gateway")
        thread.start()
        try:
            server.wait_until_started()
            yield f"{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def require_free_port(host: str, port: int) -> None:
    """Check that a port can be listened on, before anything is started behind it.

    Raises:
        EngineError: it cannot.
    """
    with _listening(host, port):
        pass


class _Server(uvicorn.Server):
    """Server that tells when it listens, or why it does not."""

    def __init__(self, config: uvicorn.Config, failures: list[BaseException]) -> None:
        super().__init__(config)
        self._failures = failures
        self._decided = threading.Event()

    def run_on(self, listener: socket.socket) -> None:
        """Serve until the end."""
        try:
            self.run(sockets=[listener])
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._decided.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, as uvicorn does, which gives a TLS handshake a minute."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                self._connection,
                sock=listener,
                ssl=self.config.ssl,
                backlog=self.config.backlog,
                ssl_handshake_timeout=None if self.config.ssl is None else _HANDSHAKE_S,
            )
            for listener in sockets or []
        ]
        self.started = True
        self._decided.set()

    def _connection(self) -> BoundedHttp:
        return BoundedHttp(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def wait_until_started(self) -> None:
        """Wait until the server listens; errors as of ``running_gateway``."""
        self._decided.wait()
        if self.started:
            return
        for failure in self._failures:
            if isinstance(failure, BabeltowerError):
                raise failure
        reason = self._failures[0] if self._failures else "it ended"
        raise EngineError(f"The gateway does not start: {reason}.")


def _config(app: ASGIApp, options: GatewayOptions) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # of warnings, every client could write as many as it likes
        access_log=False,
        server_header=False,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOP_S,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    try:
        config.load()
    except OSError as error:  # of which ssl.SSLError is one
        raise EngineError(
            f"{options.certificate} and {options.key} are no certificate and its key: {error}."
        ) from None
    return config


def _noting(app: ASGIApp, failures: list[BaseException]) -> ASGIApp:
    """Keep the error of a failed start, of which uvicorn only logs the text."""

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as error:
            if scope["type"] == "lifespan":
                failures.append(error)
            raise

    return noted


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OverflowError:
            raise EngineError(f"{port} is no port; expected 0 to 65535.") from None
        except OSError as error:
            raise EngineError(
                f"Port {port} of {host} cannot be used: {error.strerror}. Choose another port."
            ) from None
        yield listener
