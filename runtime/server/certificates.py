"""Check of a certificate and its key before anything is served with them."""

from __future__ import annotations

import ssl
from pathlib import Path

from runtime.errors import InputError

__all__ = ["require_certificate"]


def require_certificate(certificate: Path, key: Path) -> None:
    """Check that a certificate chain and a key (PEM) belong together, and that clients accept the date.

    Raises:
        InputError: a file cannot be read or is no PEM, the key is encrypted or of another certificate, or the
            certificate is not valid now.
    """
    for path in (certificate, key):
        _require_pem(path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate is its own authority here
    try:
        server.load_cert_chain(certificate, key, password=_no_password)
        client.load_verify_locations(certificate)
        _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        raise InputError(f"{certificate} is refused by clients: {error.verify_message}. Renew it.") from None
    except _EncryptedError:
        raise InputError(
            f"{key} is encrypted, and nobody enters its password where a server starts again by itself. Pass "
            "a key without one, which only you can read: openssl pkey -in KEY -out PLAIN"
        ) from None
    except OSError as error:  # of which ssl.SSLError is one
        raise InputError(f"{certificate} and {key} are no certificate and its key: {error}.") from None


class _EncryptedError(Exception):
    """The key needs a password."""


def _no_password() -> str:
    raise _EncryptedError


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Let a client connect in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)


def _require_pem(path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Pass a PEM file.") from None
    if b"-----BEGIN" not in text:
        raise InputError(f"{path} is not a PEM file.")
