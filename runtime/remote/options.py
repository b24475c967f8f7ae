"""Addresses and connection options of servers."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from runtime.errors import BabeltowerError, InputError
from runtime.manifest import require_name

__all__ = [
    "TRITON_GRPC_PREFIX",
    "UNIX",
    "Address",
    "Connection",
    "WireProtocol",
    "address_from_text",
    "bearer",
    "is_bearer",
    "is_loopback",
    "require_token",
    "token_from_file",
]

_SHORTEST_TOKEN = 16
_LONGEST_TOKEN_FILE = 4_096
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""A bearer token as of RFC 6750; other characters would end Triton's option or a header."""

TRITON_GRPC_PREFIX = "triton-grpc-protocol-"
"""Prefix of the headers that Triton's gRPC endpoint checks before it answers a restricted group."""


UNIX = "unix:"
"""Start of an address that is a Unix socket: ``unix:PATH``, as gRPC writes it."""


class WireProtocol(str, Enum):
    """Wire protocol of a server."""

    GRPC = "grpc"
    HTTP = "http"


def is_loopback(host: str) -> bool:
    """Check whether a host's name or address is this machine's own, which no other reaches."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


_DEFAULT_PORTS = {WireProtocol.GRPC: 8001, WireProtocol.HTTP: 8000}
_SCHEMES = {
    "grpc": (WireProtocol.GRPC, False),
    "grpcs": (WireProtocol.GRPC, True),
    "http": (WireProtocol.HTTP, False),
    "https": (WireProtocol.HTTP, True),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Address ``SCHEME://HOST:PORT/NAME``; ``prefix`` is a gateway's path before NAME, HTTP only.

    A gateway reaches the server behind it over a Unix socket: then the host is ``unix:PATH``, gRPC only.
    """

    protocol: WireProtocol
    tls: bool
    host: str
    port: int
    name: str
    prefix: str = ""

    @property
    def target(self) -> str:
        """``HOST:PORT``, followed by the gateway's path; or ``unix:PATH``."""
        if self.host.startswith(UNIX):
            return self.host
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.prefix}"

    @property
    def is_loopback(self) -> bool:
        """True if the server is on this machine."""
        return self.host.startswith(UNIX) or is_loopback(self.host)

    def __str__(self) -> str:
        scheme = self.protocol.value + ("s" if self.tls else "")
        return f"{scheme}://{self.target}/{self.name}"


def bearer(token: str) -> str:
    """Return the value of the header ``authorization`` for a token."""
    return f"Bearer {token}"


def is_bearer(value: bytes, token: bytes) -> bool:
    """Whether a header's value is that of a token; the time that it takes does not tell how much of it."""
    scheme, _, given = value.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)


def address_from_text(text: str) -> Address:
    """Parse ``grpc://``, ``grpcs://``, ``http://`` or ``https://`` ``HOST[:PORT]/NAME``.

    The default port is Triton's: 8001 for gRPC, 8000 for HTTP (443 for https).

    Raises:
        InputError: the scheme is unknown, host or name is missing, or there is an unexpected part.
    """
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise InputError(f"{text} has scheme {parts.scheme!r}; expected one of {sorted(_SCHEMES)}.")
    protocol, tls = _SCHEMES[parts.scheme]
    try:
        port = parts.port
    except ValueError as error:
        raise InputError(f"{text} has no valid port: {error}.") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(
            f"{parts.scheme}://{parts.hostname or ''} has a user, query or fragment; expected "
            "SCHEME://HOST:PORT/NAME. Pass secrets as Connection(token=...)."
        )
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    if not parts.hostname or not name or (prefix and protocol is WireProtocol.GRPC):
        raise InputError(f"{text} is not a host and model; expected e.g. grpc://127.0.0.1:8001/NAME.")
    try:
        require_name(name)
    except BabeltowerError as error:
        raise InputError(str(error)) from None
    default = 443 if (protocol, tls) == (WireProtocol.HTTP, True) else _DEFAULT_PORTS[protocol]
    return Address(protocol, tls, parts.hostname, port or default, name, prefix)


@dataclass(frozen=True, slots=True)
class Connection:
    """Connection options of a server.

    Attributes:
        token: Sent with every request as ``authorization: Bearer TOKEN``, and over gRPC also under the name
            of that header that Triton's own restrictions check.
        headers: Additional headers of every request.
        ca_file: CA certificates (PEM) to verify the server's; default: the system's.
        certificate_file: The client's certificate chain (PEM), if the server requires one.
        key_file: Key of the client's certificate.
        timeout_s: Timeout of one request.
        retry_for_s: Time to retry a request while the server is unavailable; 0 fails at once.
        concurrency: Maximum requests in flight, over all threads.
        texts_per_request: Texts per request; the server batches across requests anyway.
        fingerprint: Embedding space that the server must serve.
        shared_memory: Pass images in system shared memory; the server must be on this machine, and allow it:
            opening fails if it does not.
    """

    token: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: str | os.PathLike[str] | None = None
    certificate_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    timeout_s: float = 60.0
    retry_for_s: float = 30.0
    concurrency: int = 16
    texts_per_request: int = 16
    fingerprint: str | None = None
    shared_memory: bool = False

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or not self.retry_for_s >= 0:
            raise InputError(
                f"timeout_s is {self.timeout_s} and retry_for_s {self.retry_for_s}; expected above 0, and at "
                "least 0."
            )
        if self.concurrency < 1 or self.texts_per_request < 1:
            raise InputError(
                f"concurrency is {self.concurrency} and texts_per_request {self.texts_per_request}; "
                "expected at least 1."
            )
        if (self.certificate_file is None) != (self.key_file is None):
            raise InputError("certificate_file and key_file belong together; pass both or neither.")
        for path in self.tls_files:
            if not path.is_file():
                raise InputError(f"{path} is not a file; expected a PEM file.")

    @property
    def tls_files(self) -> tuple[Path, ...]:
        """TLS files that are set."""
        given = (self.ca_file, self.certificate_file, self.key_file)
        return tuple(Path(path) for path in given if path is not None)

    def all_headers(self, protocol: WireProtocol) -> dict[str, str]:
        """Return all headers, including the token's, in lower case as gRPC requires."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.token is not None:
            headers["authorization"] = bearer(self.token)
            if protocol is WireProtocol.GRPC:
                headers[f"{TRITON_GRPC_PREFIX}authorization"] = bearer(self.token)
        return headers

    def require_fitting(self, address: Address) -> None:
        """Check that the options fit an address.

        Raises:
            InputError: TLS files are set without TLS, or shared memory with a remote server.
        """
        if self.tls_files and not address.tls:
            secure = f"{address.protocol.value}s://"
            raise InputError(f"{address} does not use TLS, but certificate files were given. Use {secure}.")
        if self.shared_memory and not address.is_loopback:
            raise InputError(
                f"{address.host} is not this machine; shared memory needs a server on 127.0.0.1, ::1 or "
                "localhost."
            )


def token_from_file(path: Path) -> str:
    """Read a token: the only line of a file.

    Raises:
        InputError: the file cannot be read, or holds no token of at least 16 characters, or over 4 KiB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_TOKEN_FILE + 1)
        token = content.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a file with a token: {reason}.") from None
    if len(content) > _LONGEST_TOKEN_FILE:  # a part of a token would be another one
        raise InputError(
            f"{path} has no valid token; expected one line, of {_LONGEST_TOKEN_FILE} bytes at most."
        )
    require_token(token, str(path))
    return token


def require_token(token: str, origin: str) -> None:
    """Check that a token is long enough, and fits a header and an option of Triton.

    Raises:
        InputError: it is not; ``origin`` names it in the message.
    """
    if len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
        raise InputError(
            f"{origin} has no valid token; expected one line of at least {_SHORTEST_TOKEN} letters, digits "
            "and '._~+/-', such as the output of: openssl rand -hex 32"
        )
