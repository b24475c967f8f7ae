"""TLS and tokens with real handshakes: the right authority is let through, all else is a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from server_double import vector_of
from tls_double import TOKEN, Authority, authority, grpc_double, https_double

from runtime import Encoder
from runtime.errors import ServerError
from runtime.remote import Connection


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture(scope="module", params=[grpc_double, https_double], ids=["grpcs", "https"])
def address(request: pytest.FixtureRequest, own: Authority) -> Iterator[str]:
    with request.param(own) as found:
        yield found


def test_the_right_authority_and_token_are_let_in(address: str, own: Authority) -> None:
    with Encoder.open(address, connection=Connection(token=TOKEN, ca_file=own.ca)) as encoder:
        vectors = encoder.embed_texts(["gato", "猫"], "por_Latn")
    assert np.array_equal(vectors, np.stack([vector_of(b"gato"), vector_of("猫".encode())]))


@pytest.mark.parametrize("token", [None, "guessed"])
def test_a_missing_or_wrong_token_is_said(address: str, own: Authority, token: str | None) -> None:
    with pytest.raises(ServerError, match=r"denies access: no valid token\. Pass Connection"):
        Encoder.open(address, connection=Connection(token=token, ca_file=own.ca))


@pytest.mark.parametrize("checked_with", ["another authority", "the system's"])
def test_a_certificate_that_does_not_check_out_is_said(
    address: str, other: Authority, checked_with: str
) -> None:
    ca = other.ca if checked_with == "another authority" else None
    connection = Connection(token=TOKEN, ca_file=ca, retry_for_s=0, timeout_s=5)
    with pytest.raises(ServerError, match=r"certificate.*ca_file") as failure:
        Encoder.open(address, connection=connection)
    assert TOKEN not in str(failure.value)


@pytest.mark.parametrize("double", [grpc_double, https_double], ids=["grpcs", "https"])
def test_a_server_that_asks_for_certificates_lets_those_in_that_have_one(
    double: Callable[..., AbstractContextManager[str]], own: Authority, other: Authority
) -> None:
    with double(own, clients=other) as address:
        mine = {"certificate_file": other.certificate, "key_file": other.key}
        options = {"token": TOKEN, "ca_file": own.ca, "retry_for_s": 0, "timeout_s": 5}
        with Encoder.open(address, connection=Connection(**options, **mine)) as encoder:
            assert encoder.embed_texts(["gato"]).shape == (1, encoder.dim)
        with pytest.raises(ServerError):
            Encoder.open(address, connection=Connection(**options))


def test_a_server_without_tls_is_no_secret_channel(tmp_path: Path) -> None:
    from server_double import Double, Running

    plain = Running(Double())
    try:
        secure = plain.address.replace("grpc://", "grpcs://")
        with pytest.raises(ServerError, match="is not available"):
            Encoder.open(secure, connection=Connection(retry_for_s=0, timeout_s=5))
    finally:
        plain.kill()
