"""The examples of ``docs/http.md``, run against a server as a reader of the page runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from document_blocks import Block, blocks_of, run_python
from gateways import TOKEN, Gateway, gateway_of_server
from sample_models import ROOT, Exported

from runtime.server import ServerEnvironment
from samples import dataset

PAGE = ROOT / "docs" / "http.md"
BLOCKS = [block for block in blocks_of(PAGE) if block.language in ("bash", "python")]


@pytest.fixture(scope="module", params=[TOKEN, None], ids=["token", "no token"])
def gateway(
    request: pytest.FixtureRequest, exported: Exported, server_environment: ServerEnvironment
) -> Iterator[Gateway]:
    names = ("capivara", "nllb-siglip-mrl")
    (repository,) = {exported(name).parent for name in names}
    with gateway_of_server(repository, server_environment, names, token=request.param) as found:
        yield found


def commands_of(block: Block) -> Iterator[str]:
    """Commands of a block, each from one ``curl`` to the next."""
    for rest in block.text.split("curl ")[1:]:
        yield f"curl {rest}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_an_example_runs(
    block: Block, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert gateway.server is not None
    (tmp_path / "cat.png").write_bytes(dataset.load_gallery()[0].png)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOKEN", raising=False)
    if gateway.token is not None:
        monkeypatch.setenv("TOKEN", gateway.token)
    text = block.text.replace("127.0.0.1:8000", gateway.url.removeprefix("http://"))
    text = text.replace("127.0.0.1:8001", gateway.grpc)
    here = Block(block.language, text, block.line)
    if block.language == "python":
        run_python(here, PAGE, {"__name__": "page"})
        assert capfd.readouterr().out
        return
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for command in commands_of(here):
        done = subprocess.run(
            ["bash", "-c", f"set -e; {command.replace('curl -s', 'curl -sS --fail-with-body')}"],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if "/v1/" in command or "/infer" in command:
            answer = json.loads(done.stdout)
            assert answer.get("data") or answer.get("outputs")


def test_the_page_names_the_limits_that_hold() -> None:
    from runtime.gateway.options import GatewayOptions
    from triton_models.spec import ImageLimits, TextLimits

    text = PAGE.read_text(encoding="utf-8")
    options = GatewayOptions()
    for number in (
        options.max_inputs,
        options.max_connections,
        options.max_running,
        TextLimits().max_characters,
        TextLimits().max_request_characters,
    ):
        assert f"{number:,}" in text
    memory = options.request_memory_bytes
    for n_bytes in (options.max_file_bytes, options.max_image_json_bytes, options.max_body_bytes):
        assert f"{n_bytes / 1e6:.1f} MB" in text
    assert options.max_json_bytes == options.max_body_bytes
    assert f"{memory / 1e6:.0f} MB (`--request-memory`)" in text
    assert f"{options.max_waiting_bytes / 1e6:.0f} MB" in text
    assert f"{options.max_characters:,}" in text
    assert (ImageLimits().max_bytes, ImageLimits().max_memory_bytes) == (options.max_file_bytes, memory)
