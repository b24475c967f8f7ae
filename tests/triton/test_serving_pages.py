"""The commands of the operators' pages, run word for word as a reader does; only ports are free ones.

What a page shows after a dollar sign is run in order, unless it is listed below with a reason.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from altered_models import copied
from document_blocks import blocks_of, commands_of
from sample_models import ROOT, Exported
from serving import Serving
from tls_double import authority

from runtime.server import ServerEnvironment, running_server

PAGES = ("serving.md", "security.md", "http.md")
NOT_RUN = {
    "pip install": "the tests' environment has it",
    "babeltower export samples/checkpoints/capivara models --precision fp16 --engine cuda": "needs a GPU",
    "babeltower frontends models/capivara --variant fp16_cuda": "needs that export",
}


def commands_of_page(page: str) -> list[str]:
    blocks = [block for block in blocks_of(ROOT / "docs" / page) if block.language == "console"]
    found = [command.removeprefix("$ ") for block in blocks for command in commands_of(block)]
    return [command for command in found if not command.startswith(tuple(NOT_RUN))]


class Reader:
    """Who follows a page in a folder: one server at a time, and commands that ask it."""

    def __init__(self, environment: ServerEnvironment, upstream: str) -> None:
        self._environment = environment
        self._upstream = upstream
        self._serving: Serving | None = None

    def close(self) -> None:
        if self._serving is not None:
            self._serving.__exit__()
            assert self._serving.process.returncode == 0, self._serving.lines

    def run(self, command: str) -> None:
        words = shlex.split(command)
        if words[:2] == ["babeltower", "serve"] and "--write" not in words:
            self._serve(*words[2:])
            return
        for name, default in (("http", 8000), ("grpc", 8001)):
            if self._serving is not None and f":{default}" in command:
                address = self._serving.address(name).partition("://")[2].replace("0.0.0.0", "127.0.0.1")
                command = re.sub(rf"(host|127\.0\.0\.1):{default}\b", address, command)
        command = re.sub(r"^babeltower\b", f"{sys.executable} -m babeltower", command)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout or ">" in command

    def _serve(self, repository: str, *options: str) -> None:
        self.close()
        if "://" in repository:
            where = repository.replace("127.0.0.1:8001", self._upstream)
            self._serving = Serving(where, self._environment, *options, "--port=0")
            self._serving.wait_until_served(last_line="http ")
            return
        free = [f"--{name}=0" for name in ("port", "grpc-port", "metrics-port")]
        self._serving = Serving(repository, self._environment, *options, *free)
        self._serving.wait_until_served()


@pytest.fixture(scope="module")
def upstream(exported: Exported, server_environment: ServerEnvironment) -> Iterator[str]:
    """gRPC address of a server elsewhere, such as a container's."""
    with running_server(exported("capivara").parent, environment=server_environment) as server:
        yield server.addresses.grpc


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(
    page: str,
    exported: Exported,
    server_environment: ServerEnvironment,
    upstream: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("capivara", "nllb-clip"):
        copied(exported(name), tmp_path / "from" / name)
        for folder in ("models", "staging"):
            subprocess.run(
                f"mkdir -p {folder} && cp -r from/{name}/* {folder}", shell=True, cwd=tmp_path, check=True
            )
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["um gato", "um cão"]}), tmp_path / "captions.parquet")
    own = authority(tmp_path / "tls")
    for name, path in (("cert.pem", own.certificate), ("key.pem", own.key), ("ca.pem", own.ca)):
        (tmp_path / name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    reader = Reader(server_environment, upstream)
    commands = commands_of_page(page)
    assert commands
    try:
        for command in commands:
            reader.run(command)
    finally:
        reader.close()
