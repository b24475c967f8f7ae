"""Options of the gateway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.preprocessing.served_limits import SERVED_BYTES, SERVED_MEMORY_BYTES, largest_file_bytes

__all__ = ["GatewayOptions", "GrpcDoor", "TritonEndpoint"]


_REST_BYTES = 64 << 10
"""Room in a body for what is not the file."""


@dataclass(frozen=True, slots=True)
class TritonEndpoint:
    """Triton server behind the gateway; addresses are ``HOST:PORT`` or ``unix:PATH``.

    Attributes:
        headers: Headers of every request that the gateway forwards.
        is_healthy: Whether the server's models answer rightly, as far as who watches it knows. Triton's own
            readiness does not tell.
    """

    http: str
    metrics: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    is_healthy: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True)
class GrpcDoor:
    """gRPC of a server behind the gateway, and where the gateway answers for it.

    Attributes:
        upstream: gRPC target of the server, which only this process reaches.
        port: 0 picks a free one.
        bound: Port that was picked, once the gateway has started.
    """

    upstream: str
    host: str
    port: int
    bound: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Options of the gateway.

    Attributes:
        token: Bearer token that every request but those for health must send; ``None`` lets everybody in.
        certificate, key: Certificate chain and key (PEM) of TLS; neither or both.
        default_language: Language of texts whose request names none, for clients that cannot.
        immich_names: Models by further names, by which immich asks for them.
        other_tasks_url: Service that answers immich's tasks other than CLIP's.
        request_memory_bytes: Maximum memory of a request in all processes; see ``with_memory``.
        max_file_bytes: Maximum size of an image.
        max_body_bytes: Maximum size of a body of ``/v2`` or ``/predict``, or of a message of guarded gRPC.
        max_json_bytes: Maximum size of the JSON in a body of ``/v2``.
        max_image_json_bytes: Maximum size of a body of ``/v1``: room for one image in base64.
        max_waiting_bytes: Maximum memory of all HTTP requests being answered: their bodies, and what their
            values take when they are parsed; and, of its own, of all messages of guarded gRPC. Further ones
            are told to come back later.
        max_inputs: Maximum texts and images of a request.
        max_characters: Maximum characters of all texts of a request: two seconds or so of tokenizing.
        max_connections: Maximum HTTP connections; over it, those that wait longest for their clients end.
        max_running: Maximum requests being answered, of HTTP (apart from those for health) and of guarded
            gRPC each.
        body_s: Maximum time for a body to arrive.
    """

    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    default_language: str | None = None
    immich_names: Mapping[str, str] = field(default_factory=dict)
    other_tasks_url: str | None = None
    request_memory_bytes: int = SERVED_MEMORY_BYTES
    max_file_bytes: int = SERVED_BYTES
    max_body_bytes: int = SERVED_BYTES + _REST_BYTES
    max_json_bytes: int = SERVED_BYTES + _REST_BYTES
    max_image_json_bytes: int = SERVED_BYTES * 4 // 3 + _REST_BYTES
    max_waiting_bytes: int = 4 * SERVED_MEMORY_BYTES
    max_inputs: int = 2_048
    max_characters: int = 1 << 20
    max_connections: int = 2_048
    max_running: int = 1_024
    body_s: float = 60.0

    def with_memory(self, n_bytes: int) -> GatewayOptions:
        """Return the options whose sizes fit a request's memory in all processes of a server."""
        file_bytes = largest_file_bytes(n_bytes)
        return replace(
            self,
            request_memory_bytes=n_bytes,
            max_file_bytes=file_bytes,
            max_body_bytes=file_bytes + _REST_BYTES,
            max_json_bytes=file_bytes + _REST_BYTES,
            max_image_json_bytes=file_bytes * 4 // 3 + _REST_BYTES,
            max_waiting_bytes=4 * n_bytes,
        )
