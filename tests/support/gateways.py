"""Gateways of the tests: in front of a real Triton server, and of models in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from runtime.commands.doors import Door, guarded_server, local_models, running_door
from runtime.gateway.models import Residence, local_opener
from runtime.gateway.options import GatewayOptions
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server
from runtime.server.security import Security

TOKEN = "a-token-of-the-tests-0123456789"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Gateway:
    """A running gateway; ``server`` is the Triton server behind it, if any; clients reach it at ``grpc``."""

    url: str
    token: str | None
    server: Server | None = None
    grpc: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a client that may ask."""
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}

    def client(self, **options: object) -> httpx.Client:
        """A client that may ask."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=120, trust_env=False, **options)


@contextlib.contextmanager
def gateway_of_server(
    repository: Path, environment: ServerEnvironment, names: tuple[str, ...], *, token: str | None
) -> Iterator[Gateway]:
    """What ``babeltower serve --http-api`` runs."""
    security = Security(token, guarded=True)
    options = ServerOptions(security=security)
    door = Door(HOST, 0, GatewayOptions(token))
    with (
        running_server(repository, environment=environment, options=options) as server,
        guarded_server(door, server, names, http_api=True) as reached,
    ):
        yield Gateway(reached.http_url, token, server, reached.grpc)


@contextlib.contextmanager
def gateway_of_process(
    repository: Path, *, options: GatewayOptions | None = None, residence: Residence | None = None
) -> Iterator[Gateway]:
    """What ``babeltower serve --http-api --in-process`` runs."""
    options = options or GatewayOptions(TOKEN)
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(model) for model in local_models(repository, None)]
        door = Door(HOST, 0, replace(options))
        url = stack.enter_context(running_door(door, [local_opener(model, residence) for model in models]))
        yield Gateway(url, options.token)
