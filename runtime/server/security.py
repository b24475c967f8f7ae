"""Access to a server: token, TLS, and the groups of Triton's interface that clients may use.

Triton can ask for a header before it answers a group of requests, over HTTP and gRPC alike. Health stays
open, for load balancers. Inference, configurations and statistics need the token, if there is one. Groups
that change the server (control of models, shared memory, logging, traces) are closed to everybody unless
they were asked for: their header is a secret that only the process that started the server knows.

Triton takes these headers on its command line, which other users of the same machine can read.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from runtime.errors import InputError
from runtime.remote.options import bearer, is_loopback, require_token

__all__ = ["Security", "require_address", "require_safe_exposure"]

_HTTP, _GRPC = "http-restricted-api", "grpc-restricted-protocol"
_SECRET_HEADER, _GUARD_HEADER = "babeltower-secret", "babeltower-guard"
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
        guarded: Answer over HTTP only what the gateway forwards, which knows ``secret``; health too.
        secret, guard_secret: Values of the headers that open the groups that clients may not use, and, over
            HTTP, those that they may use through the gateway.
    """

    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    shared_memory: bool = False
    guarded: bool = False
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    guard_secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def __post_init__(self) -> None:
        if self.token is not None:
            require_token(self.token, "The token")
        if (self.certificate is None) != (self.key is None):
            raise InputError("A certificate and its key belong together; pass both (--tls-cert, --tls-key).")
        for path in (self.certificate, self.key):
            if path is not None:
                _require_pem(path)

    @property
    def is_closed(self) -> bool:
        """Whether strangers who reach the server are kept out, or from reading along."""
        return self.token is not None or self.certificate is not None

    def headers(self) -> dict[str, str]:
        """Headers of HTTP requests to which nothing is refused; for the process that started the server."""
        return {**self.client_headers(), _SECRET_HEADER: self.secret}

    def client_headers(self) -> dict[str, str]:
        """Headers of HTTP requests to which nothing is refused that clients may do."""
        if self.guarded:
            return {_GUARD_HEADER: self.guard_secret}
        return {} if self.token is None else {"authorization": bearer(self.token)}

    def arguments(self, *, control: bool) -> Iterator[str]:
        """Yield the options of ``tritonserver``.

        Args:
            control: Let clients load and unload models, which amounts to running code.
        """
        closed = [*_NEVER]
        for_clients = [*_FOR_CLIENTS]
        (for_clients if control else closed).append(_CONTROL)
        (for_clients if self.shared_memory else closed).append(_SHARED_MEMORY)
        for option in (_HTTP, _GRPC):
            yield f"--{option}={','.join(closed)}:{_SECRET_HEADER}={self.secret}"
        if self.guarded:
            yield f"--{_HTTP}=health,{','.join(for_clients)}:{_GUARD_HEADER}={self.guard_secret}"
        elif self.token is not None:
            yield f"--{_HTTP}={','.join(for_clients)}:authorization={bearer(self.token)}"
        if self.token is not None:
            yield f"--{_GRPC}={','.join(for_clients)}:authorization={bearer(self.token)}"
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


def _require_pem(path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Pass a PEM file.") from None
    if b"-----BEGIN" not in text:
        raise InputError(f"{path} is not a PEM file.")
