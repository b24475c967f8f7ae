"""Access to a server: token, TLS, and the groups of Triton's interface that clients may use.

Triton can ask for a header before it answers a group of requests, over HTTP and gRPC alike. Health stays
open, for load balancers. Inference, configurations and statistics need the token, if there is one. Groups
that change the server (control of models, shared memory, logging, traces) are closed to everybody unless
they were asked for: over HTTP, their header is a secret that only the process that started the server knows;
over gRPC, it has a name that no client can send.

Triton takes these headers on its command line, which other users of the same machine can read. So where the
gateway guards it, Triton gets no token, and listens on Unix sockets that only their owner reaches.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from runtime.errors import InputError
from runtime.remote.options import bearer, is_loopback, require_token
from runtime.server.certificates import require_certificate

__all__ = ["Security", "require_address", "require_safe_exposure"]

_HTTP, _GRPC = "http-restricted-api", "grpc-restricted-protocol"
_SECRET_HEADER = "babeltower-secret"
_UNSENDABLE_HEADER = "Babeltower-Closed"
"""Names of headers are in lower case in HTTP/2; Triton compares them letter by letter."""
_FOR_CLIENTS = ("inference", "metadata", "model-config", "statistics")
_CONTROL, _SHARED_MEMORY = "model-repository", "shared-memory"
_NEVER = ("trace", "logging")


@dataclass(frozen=True, slots=True)
class Security:
    """Access to a server.

    Attributes:
        token: Bearer token that every client must send; ``None`` lets everybody in who reaches the server.
        certificate, key: Certificate chain and key (PEM) of gRPC; neither or both.
        shared_memory: Let clients register regions of this machine's shared memory.
        guarded: Behind the gateway, which asks for the token, bounds what is sent, and has the certificate.
        secret: Value of the header that opens, over HTTP, the groups that clients may not use.
    """

    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    shared_memory: bool = False
    guarded: bool = False
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def __post_init__(self) -> None:
        if self.token is not None:
            require_token(self.token, "The token")
        if (self.certificate is None) != (self.key is None):
            raise InputError("A certificate and its key belong together; pass both (--tls-cert, --tls-key).")
        if self.certificate is not None and self.key is not None:
            require_certificate(self.certificate, self.key)

    @property
    def is_closed(self) -> bool:
        """Whether strangers who reach the server are kept out, or from reading along."""
        return self.token is not None or self.certificate is not None

    def headers(self) -> dict[str, str]:
        """Headers of HTTP requests to which nothing is refused; for the process that started the server."""
        return {**self.client_headers(), _SECRET_HEADER: self.secret}

    def client_headers(self) -> dict[str, str]:
        """Headers of HTTP requests to which nothing is refused that clients may do."""
        return {} if self.token is None or self.guarded else {"authorization": bearer(self.token)}

    def arguments(self, *, control: bool) -> Iterator[str]:
        """Yield the options of ``tritonserver``.

        Args:
            control: Let clients load and unload models, which amounts to running code.
        """
        closed = [*_NEVER]
        for_clients = [*_FOR_CLIENTS]
        (for_clients if control else closed).append(_CONTROL)
        (for_clients if self.shared_memory else closed).append(_SHARED_MEMORY)
        yield f"--{_HTTP}={','.join(closed)}:{_SECRET_HEADER}={self.secret}"
        yield f"--{_GRPC}={','.join(closed)}:{_UNSENDABLE_HEADER}=1"
        if self.guarded:
            return
        if self.token is not None:
            for option in (_HTTP, _GRPC):
                yield f"--{option}={','.join(for_clients)}:authorization={bearer(self.token)}"
        if self.certificate is not None:
            yield "--grpc-use-ssl=true"
            yield f"--grpc-server-cert={self.certificate}"
            yield f"--grpc-server-key={self.key}"


def require_address(host: str) -> None:
    """Check an address to listen on.

    Raises:
        InputError: it is no IPv4 address.
    """
    try:
        is_usable = host == "localhost" or ip_address(host).version == 4
    except ValueError:
        is_usable = False
    if not is_usable:
        raise InputError(
            f"--host {host!r} is no address to listen on; expected an IPv4 address of this machine, such as "
            "127.0.0.1, or 0.0.0.0 for all of them."
        )


def require_safe_exposure(host: str, security: Security, *, insecure: bool) -> None:
    """Check that a server which others can reach has a token or TLS.

    Raises:
        InputError: it has neither, and ``--insecure`` was not said; or the address is none.
    """
    require_address(host)
    if is_loopback(host) or security.is_closed or insecure:
        return
    raise InputError(
        f"--host {host} lets other machines reach the server without a token or TLS. Pass --token-file FILE "
        "(and --tls-cert and --tls-key, so that the token is not read on the way), or say --insecure."
    )
