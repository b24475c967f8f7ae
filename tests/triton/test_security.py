"""Tokens and TLS of a real server, checked over every protocol and by every command that connects to one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from sample_models import Exported
from tls_double import Authority, authority, expired
from typer.testing import CliRunner

from runtime import Encoder
from runtime.commands.app import app
from runtime.errors import InputError, ServerError
from runtime.remote import Connection
from runtime.remote.options import is_loopback, token_from_file
from runtime.server import ServerEnvironment
from runtime.server.security import Security, require_address, require_safe_exposure

TOKEN = "0123456789abcdef-of-the-tests"
NAME = "capivara"


@dataclass(frozen=True)
class Served:
    """Addresses that ``babeltower serve`` printed."""

    http: str
    grpc: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture(scope="module")
def served(
    exported: Exported, server_environment: ServerEnvironment, own: Authority, token_file: Path
) -> Iterator[Served]:
    """``babeltower serve`` for other machines too, with TLS and a token."""
    command = [
        *(sys.executable, "-m", "babeltower", "serve", str(exported(NAME).parent), "--host", "0.0.0.0"),
        *("--port=0", "--grpc-port=0", "--metrics-port=0", f"--env={server_environment.folder}"),
        *("--token-file", str(token_file), "--tls-cert", str(own.certificate), "--tls-key", str(own.key)),
        "--http-api",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = {}
    for line in process.stdout:
        name, _, rest = line.strip().partition(" ")
        told[name] = rest.strip().replace("0.0.0.0", "127.0.0.1")
        if name == "metrics":
            break
    yield Served(told["http"], told["grpc"], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def test_every_protocol_is_encrypted_and_asks_for_the_token(
    served: Served, own: Authority, exported: Exported
) -> None:
    with Encoder.open(exported(NAME), threads=1) as encoder:
        expected = encoder.embed_texts(["um gato"])
    assert served.http.startswith("https://")
    assert served.grpc.startswith("grpcs://")
    for address in (served.http, served.grpc):
        connection = Connection(token=TOKEN, ca_file=own.ca)
        with Encoder.open(f"{address}/{NAME}", connection=connection) as remote:
            np.testing.assert_allclose(remote.embed_texts(["um gato"]), expected, rtol=0, atol=1e-6)
        for token in (None, "another-token-0123456789"):
            with pytest.raises(ServerError, match=r"denies access.*--token-file"):
                Encoder.open(f"{address}/{NAME}", connection=Connection(token=token, ca_file=own.ca))
        with pytest.raises(ServerError, match=r"certificate"):
            Encoder.open(f"{address}/{NAME}", connection=Connection(token=TOKEN, retry_for_s=0, timeout_s=5))


def test_the_gateway_embeds_behind_tls(served: Served, own: Authority, exported: Exported) -> None:
    import ssl

    with Encoder.open(exported(NAME), threads=1) as encoder:
        expected = encoder.embed_texts(["um gato"])
    context = ssl.create_default_context(cafile=str(own.ca))
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=served.http, verify=context, headers=headers, trust_env=False) as client:
        answer = client.post("/v1/embeddings", json={"model": NAME, "input": "um gato"}).json()
        found = np.array([answer["data"][0]["embedding"]], np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert b"nv_inference_request_success" in client.get("/metrics").content


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "babeltower", *words],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    )  # fmt: skip


def test_commands_pass_the_token_and_the_authority(
    served: Served, own: Authority, token_file: Path, exported: Exported, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("um gato\num cão\n")
    secure = ["--token-file", str(token_file), "--ca-file", str(own.ca)]
    for scheme in ("http", "grpc"):
        address = f"{getattr(served, scheme)}/{NAME}"
        vectors = tmp_path / scheme
        embed = ["embed", address, str(tmp_path / "texts.txt"), "--out", str(vectors)]
        refused = run(*embed, "--ca-file", str(own.ca))
        assert refused.returncode == 1
        assert "denies access" in refused.stderr
        done = run(*embed, *secure)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in "".join(path.read_text() for path in vectors.glob("*.jsonl"))
        found = run("search", address, str(vectors), "um gato", *secure)
        assert found.returncode == 0, found.stderr
        refused = run("search", address, str(vectors), "um gato", "--ca-file", str(own.ca))
        assert "denies access" in refused.stderr
    rollout = ["rollout", str(exported(NAME)), "--to", str(exported(NAME)), "--url", served.grpc]
    closed = run(*rollout, *secure)
    assert closed.returncode == 1
    assert "babeltower serve --control" in closed.stderr
    for command in (
        ["embed", str(exported(NAME)), "x", "--out", "y"],
        ["search", str(exported(NAME)), "x", "y"],
    ):
        local = run(*command, "--token-file", str(token_file))
        assert local.returncode == 1
        assert "are for a server's address" in local.stderr


def serve(*options: str, repository: Path) -> str:
    done = CliRunner().invoke(app, ["serve", str(repository), "--port=0", *options])
    assert done.exit_code == 1
    return done.output.replace("\n", " ")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_other_machines_are_let_in_only_where_it_is_said(host: str, exported: Exported) -> None:
    repository = exported(NAME).parent
    said = serve("--host", host, repository=repository)
    assert "lets other machines reach the server without a token or TLS" in said
    said = serve("--host", host, "--http-api", "--in-process", repository=repository)
    assert "lets other machines reach the server without a token or TLS" in said
    require_safe_exposure(host, Security(), insecure=True)
    require_safe_exposure(host, Security(TOKEN), insecure=False)
    require_safe_exposure("127.0.0.1", Security(), insecure=False)


@pytest.mark.parametrize("host", ["::1", "::"])
def test_hosts_of_ipv6_are_refused(host: str, exported: Exported) -> None:
    assert "serve listens on IPv4" in serve("--host", host, "--insecure", repository=exported(NAME).parent)


def test_the_old_server_is_not_exposed_without_its_guard(exported: Exported, token_file: Path) -> None:
    repository = exported(NAME).parent
    secure = ("--host", "0.0.0.0", "--token-file", str(token_file))
    assert "docs/security.md" in serve("--no-guard", *secure, repository=repository)
    assert "leave out --no-guard" in serve("--no-guard", "--http-api", repository=repository)


def test_a_server_without_a_guard_asks_for_the_token_itself(
    exported: Exported, server_environment: ServerEnvironment
) -> None:
    from runtime.server import ServerOptions, running_server

    options = ServerOptions(security=Security(TOKEN))
    with running_server(exported(NAME).parent, environment=server_environment, options=options) as server:
        for address in (f"http://{server.addresses.http}/{NAME}", f"grpc://{server.addresses.grpc}/{NAME}"):
            with Encoder.open(address, connection=Connection(token=TOKEN)) as remote:
                assert remote.embed_texts(["gato"]).shape == (1, remote.dim)
            with pytest.raises(ServerError, match="denies access"):
                Encoder.open(address)
            with pytest.raises(ServerError, match="does not take shared memory"):
                Encoder.open(address, connection=Connection(token=TOKEN, shared_memory=True))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "short",
        "a token of several words",
        "päßword-0123456789",
        f"{TOKEN}\n{TOKEN}\n",
        "a,b:c=d" * 5,
        pytest.param("a" * 5_000, id="too long"),
    ],
)
def test_a_file_without_a_token_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(InputError, match="has no valid token; expected one line") as failure:
        token_from_file(path)
    assert content.strip() == "" or content.strip() not in str(failure.value)


def test_files_that_are_not_there_are_one_line(exported: Exported, own: Authority, tmp_path: Path) -> None:
    repository = exported(NAME).parent
    with pytest.raises(InputError, match="cannot be read as a file with a token"):
        token_from_file(tmp_path)
    assert "cannot be read" in serve("--token-file", str(tmp_path / "none"), repository=repository)
    assert "belong together" in serve("--tls-cert", str(own.certificate), repository=repository)
    both = ("--tls-cert", str(tmp_path / "none"), "--tls-key", str(own.key))
    assert "cannot be read" in serve(*both, repository=repository)
    (tmp_path / "text").write_text("no PEM")
    both = ("--tls-cert", str(own.certificate), "--tls-key", str(tmp_path / "text"))
    assert "is not a PEM file" in serve(*both, repository=repository)
    both = ("--tls-cert", str(own.key), "--tls-key", str(own.certificate), "--http-api", "--in-process")
    assert "no certificate and its key" in serve(*both, repository=repository)


def test_certificates_that_serve_nobody_are_refused_before_the_start(
    exported: Exported, own: Authority, tmp_path: Path
) -> None:
    repository = exported(NAME).parent
    other = authority(tmp_path / "other")
    both = ("--tls-cert", str(own.certificate), "--tls-key", str(other.key))
    assert "no certificate and its key" in serve(*both, repository=repository)
    old = expired(own, tmp_path / "old")
    said = serve("--tls-cert", str(old), "--tls-key", str(own.key), repository=repository)
    assert "is refused by clients: certificate has expired. Renew it." in said
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", own.key, "-aes128", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    said = serve("--tls-cert", str(own.certificate), "--tls-key", str(locked), repository=repository)
    assert "is encrypted" in said


def test_a_file_that_does_not_end_is_no_token() -> None:
    with pytest.raises(InputError, match="has no valid token"):
        token_from_file(Path("/dev/zero"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "  "])
def test_a_token_is_read_as_editors_of_every_system_write_it(start: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(f"{start}{TOKEN}{end}".encode())
    assert token_from_file(tmp_path / "token") == TOKEN


@pytest.mark.parametrize(
    ("host", "found"), [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback_addresses(host: str, found: bool) -> None:
    assert is_loopback(host) is found


@pytest.mark.parametrize("host", ["example.org", "", "::", "1.2.3"])
def test_hosts_that_are_no_addresses_are_refused(host: str) -> None:
    with pytest.raises(InputError, match="IPv4"):
        require_address(host)


def test_secrets_are_not_printed() -> None:
    security = Security(TOKEN)
    assert TOKEN not in repr(security)
    assert security.secret not in repr(security)
    assert Security().secret != Security().secret
