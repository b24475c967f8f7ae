"""Doors of ``babeltower serve``: the gateway before Triton, an address, or models of this process."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from runtime.errors import InputError
from runtime.extras import needing
from runtime.manifest import Modality
from runtime.remote.options import UNIX

if TYPE_CHECKING:
    from runtime.gateway.models import ModelOpener
    from runtime.gateway.options import GatewayOptions
    from runtime.local import LocalEncoder
    from runtime.remote.options import Address, Connection
    from runtime.server.process import Server

__all__ = [
    "Door",
    "GuardedAddresses",
    "guarded_server",
    "local_models",
    "names_for_immich",
    "place_of_model",
    "require_gateway",
    "require_service_url",
    "running_door",
]

_EXTRA = "babeltower[gateway]"
_LOOPBACK, _EVERYWHERE = "127.0.0.1", "0.0.0.0"
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Door:
    """Address of the gateway, and its options."""

    host: str
    port: int
    options: GatewayOptions

    def url(self, address: str) -> str:
        """Return the URL of ``HOST:PORT``."""
        return f"http{'s' if self.options.certificate else ''}://{address}"


def require_gateway(what: str, *, remedy: str = "") -> None:
    """Check that the gateway's packages are installed.

    Raises:
        MissingPackageError: they are not.
    """
    with needing(what, _EXTRA, remedy=remedy):
        import aiohttp
        import prometheus_client
        import pydantic
        import python_multipart
        import starlette
        import uvicorn

        del aiohttp, prometheus_client, pydantic, python_multipart, starlette, uvicorn


def require_service_url(url: str) -> None:
    """Check the address of another service.

    Raises:
        InputError: it is no URL of HTTP.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(
            f"--other-tasks-url {url!r} is no address of a service; expected such as "
            "http://immich-machine-learning:3003."
        )


@contextlib.contextmanager
def running_door(door: Door, openers: Sequence[ModelOpener]) -> Iterator[str]:
    """Run the gateway in front of models; yields its URL. Errors as of ``running_gateway``."""
    from runtime.gateway.app import gateway_app
    from runtime.gateway.serving import running_gateway

    app = gateway_app(openers, door.options)
    with running_gateway(app, door.host, door.port, door.options) as address:
        yield door.url(address)


@dataclass(frozen=True, slots=True)
class GuardedAddresses:
    """Addresses at which clients reach a server behind the gateway."""

    http_url: str
    grpc: str


@contextlib.contextmanager
def guarded_server(
    door: Door,
    server: Server,
    names: Sequence[str],
    *,
    http_api: bool,
    grpc_port: int = 0,
    is_healthy: Callable[[], bool] = lambda: True,
) -> Iterator[GuardedAddresses]:
    """Run the gateway in front of a guarded server; errors as of ``running_gateway``.

    Args:
        names: Models of the server.
        http_api: Also answer ``/v1``.
        grpc_port: Port of gRPC, where that is guarded too.
        is_healthy: Whether the server's models answer rightly; ``/v2/health/ready`` says so.
    """
    from runtime.gateway.app import gateway_app
    from runtime.gateway.models import remote_opener
    from runtime.gateway.options import GrpcDoor, TritonEndpoint
    from runtime.gateway.serving import running_gateway

    addresses = server.addresses
    openers = [remote_opener(*place_of_model(server, name)) for name in names]
    triton = TritonEndpoint(addresses.http, addresses.metrics, server.security.client_headers(), is_healthy)
    grpc = GrpcDoor(addresses.grpc, door.host, grpc_port) if addresses.grpc.startswith(UNIX) else None
    app = gateway_app(openers if http_api else [], door.options, triton=triton, grpc=grpc)
    with running_gateway(app, door.host, door.port, door.options) as address:
        reached = addresses.grpc if grpc is None else f"{door.host}:{grpc.bound[0]}"
        yield GuardedAddresses(door.url(address), reached)


def place_of_model(server: Server, name: str) -> tuple[Address, Connection]:
    """Return a model's gRPC address on a server of this process, and how to connect to it."""
    from runtime.remote.options import Address, Connection, WireProtocol

    security, grpc = server.security, server.addresses.grpc
    if grpc.startswith(UNIX):
        return Address(WireProtocol.GRPC, False, grpc, 0, name), Connection(retry_for_s=_RETRY_S)
    host, _, port = grpc.rpartition(":")
    host = _LOOPBACK if host == _EVERYWHERE else host
    has_tls = security.certificate is not None
    connection = Connection(token=security.token, ca_file=security.certificate, retry_for_s=_RETRY_S)
    return Address(WireProtocol.GRPC, has_tls, host, int(port), name), connection


def names_for_immich(repository: Path | None, given: Sequence[str]) -> dict[str, str]:
    """Return models by the names by which immich asks for them, besides their own.

    A model of a published architecture has the architecture's name, if it is the only one; ``given`` are
    further ones.

    Args:
        repository: Folder of the models; ``None`` if they are elsewhere.
        given: ``NAME=MODEL`` each.

    Raises:
        InputError: one of ``given`` is not of this form, names no model, or a name is there twice.
    """
    from runtime.immich_names import name_of_architecture
    from runtime.repository import manifests_of_repository

    manifests = [] if repository is None else list(manifests_of_repository(repository))
    own = {manifest.name for manifest in manifests}
    by_architecture: dict[str, list[str]] = {}
    for manifest in manifests:
        name = name_of_architecture(
            manifest.architecture, dim=manifest.dim, has_mrl_heads=bool(manifest.mrl_dims)
        )
        if name is not None and name not in own:
            by_architecture.setdefault(name, []).append(manifest.name)
    names = {name: found[0] for name, found in by_architecture.items() if len(found) == 1}
    return names | _given_names(given, own if manifests else None)


def _given_names(given: Sequence[str], models: Collection[str] | None) -> dict[str, str]:
    names: dict[str, str] = {}
    for pair in given:
        name, separator, model = pair.partition("=")
        if not (name and separator and model):
            raise InputError(f"--immich-name {pair!r} is not NAME=MODEL.")
        if models is not None and model not in models:
            raise InputError(f"--immich-name {pair!r}: there is no model {model!r}, only {sorted(models)}.")
        if name in names or name in (models or ()):
            raise InputError(f"--immich-name {pair!r}: the name {name!r} is taken already.")
        names[name] = model
    return names


def local_models(
    repository: Path,
    default_language: str | None,
    preload: Collection[Modality] = tuple(Modality),
    *,
    device: str | None = None,
) -> Iterator[LocalEncoder]:
    """Open every model of a repository in this process: its front ends' variant, or the only one.

    Args:
        preload: Towers that are opened now; others are at their first use.
        device: As in ``Encoder.open``, for all models.

    Raises:
        InputError: a model has several variants and no front ends.
        BabeltowerError: a model cannot be opened.
    """
    from runtime.local import LocalEncoder
    from runtime.repository import manifests_of_repository

    for manifest in manifests_of_repository(repository):
        served = [front_ends.variant for front_ends in manifest.front_ends]
        keys = served or list(manifest.variants)
        if len(keys) != 1:
            raise InputError(
                f"{manifest.name} has the variants {keys}, and no front ends that serve one. Choose one: "
                f"babeltower frontends {shlex.quote(str(repository / manifest.name))} --variant {keys[0]}"
            )
        variant = manifest.variants[keys[0]]
        encoder = LocalEncoder.from_repository(
            repository / manifest.name,
            engine=variant.engines[0],
            precision=variant.precision,
            default_language=default_language,
            device=device,
        )
        for modality in preload:
            encoder.open_tower(modality)
        yield encoder
