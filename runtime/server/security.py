"""Access to a server: token, TLS, and the groups of Triton's interface that clients may use.

Triton can ask for a header before it answers a group of requests, over HTTP and gRPC alike. Health stays
open, for load balancers. Inference, configurations and statistics need the token, if there is one. Groups
that change the server (control of models, shared memory, logging, traces) are closed to everybody unless
they were asked for: their header is a secret that only the process that started the server knows.

Triton takes these headers on its command line, which other users of the same machine can read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from runtime.errors import InputError
from runtime.remote.options import bearer

__all__ = ["Security", "is_loopback", "require_safe_exposure", "token_from_file"]

_SHORTEST_TOKEN = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""A bearer token as of RFC 6750; other characters would end Triton's option or a header."""

_SECRET_HEADER = "babeltower-secret"
_FOR_CLIENTS = ("inference", "metadata", "model-config", "statistics")
_CONTROL, _SHARED_MEMORY = "model-repository", "shared-memory"
_NEVER = ("trace", "logging")


@dataclass(frozen=True, slots=True)
class Security:
    """Access to a server.

    Attributes:
        token: Bearer token that every client must send; ``None`` lets everybody in who reaches the server.
        certificate, key: Certificate chain and key (PEM) of gRPC; neither or both.
        control: Let clients load and unload models, which amounts to running code.
        shared_memory: Let clients register regions of this machine's shared memory.
        secret: Value of the header that opens every group.
    """

    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    control: bool = False
    shared_memory: bool = True
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def __post_init__(self) -> None:
        if self.token is not None:
            _require_token(self.token, "The token")
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
        """Headers of HTTP requests to which nothing is refused."""
        told = {} if self.token is None else {"authorization": bearer(self.token)}
        return {**told, _SECRET_HEADER: self.secret}

    def arguments(self) -> Iterator[str]:
        """Yield the options of ``tritonserver``."""
        closed = [*_NEVER]
        for_clients = [*_FOR_CLIENTS]
        (for_clients if self.control else closed).append(_CONTROL)
        (for_clients if self.shared_memory else closed).append(_SHARED_MEMORY)
        for option in ("http-restricted-api", "grpc-restricted-protocol"):
            yield f"--{option}={','.join(closed)}:{_SECRET_HEADER}={self.secret}"
            if self.token is not None:
                yield f"--{option}={','.join(for_clients)}:authorization={bearer(self.token)}"
        if self.certificate is not None:
            yield "--grpc-use-ssl=true"
            yield f"--grpc-server-cert={self.certificate}"
            yield f"--grpc-server-key={self.key}"


def token_from_file(path: Path) -> str:
    """Read a token: the only line of a file.

    Raises:
        InputError: the file cannot be read, or holds no token of at least 16 characters.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a file with a token: {reason}.") from None
    _require_token(token, str(path))
    return token


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only.

    Raises:
        InputError: it is no IPv4 address.
    """
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        raise InputError(
            f"--host {host!r} is no address to listen on; expected an IPv4 address of this machine, such as "
            "127.0.0.1, or 0.0.0.0 for all of them."
        ) from None
    if address.version != 4:
        raise InputError(f"--host {host} is an IPv6 address; pass an IPv4 address of this machine.")
    return address.is_loopback


def require_safe_exposure(host: str, security: Security, *, insecure: bool) -> None:
    """Check that a server which others can reach has a token or TLS.

    Raises:
        InputError: it has neither, and ``--insecure`` was not said.
    """
    if is_loopback(host) or security.is_closed or insecure:
        return
    raise InputError(
        f"--host {host} lets other machines reach the server without a token or TLS. Pass --token-file FILE "
        "(and --tls-cert and --tls-key, so that the token is not read on the way), or say --insecure."
    )


def _require_token(token: str, origin: str) -> None:
    if len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
        raise InputError(
            f"{origin} has no valid token; expected one line of at least {_SHORTEST_TOKEN} letters, digits "
            "and '._~+/-', such as the output of: openssl rand -hex 32"
        )


def _require_pem(path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Pass a PEM file.") from None
    if b"-----BEGIN" not in text:
        raise InputError(f"{path} is not a PEM file.")
