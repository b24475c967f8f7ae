"""``--device`` in every command that opens towers: the named GPU alone, or the reason why not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from cuda_double import CudaBindings, CudaOnnxRuntime, install
from sample_models import CHECKPOINTS, Exported
from typer.testing import CliRunner

from runtime.commands.app import COMMANDS, app
from runtime.commands.doors import local_models
from runtime.manifest import Manifest

Doubles = tuple[CudaBindings, CudaOnnxRuntime]

OPENS_TOWERS = {"export", "serve", "embed", "search"}
"""Commands that open towers in their own process."""

OPENS_NONE = {
    "frontends": "writes files",
    "index": "reads vectors",
    "inspect": "reads files",
    "languages": "reads a manifest",
    "engines": "lists every device",
    "quantize": "INT8 for processors only",
    "ready": "asks a server",
    "rollout": "asks a server",
    "status": "reads files",
    "tune": "runs a server",
    "verify": "reads vectors",
}


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    found = install(monkeypatch, tmp_path / "doubles")
    found[0]._n_devices = 2
    return found


def said(*arguments: str, code: int = 1) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_every_command_that_opens_towers_has_the_option() -> None:
    assert {entry.name for entry in COMMANDS} == OPENS_TOWERS | set(OPENS_NONE)
    for name in sorted(OPENS_TOWERS | set(OPENS_NONE)):
        text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        has = re.search(r"--device\s+cpu\|cuda\[:N\]", text) is not None
        assert has is (name in OPENS_TOWERS), name


BENCHMARKS = {"latency", "throughput", "retrieval", "zeroshot"}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_of_towers_has_the_option(name: str) -> None:
    command = importlib.import_module(f"bench.{name}").app
    text = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert re.search(r"--device\s+cpu\|cuda\[:N\]", text) is not None
    result = CliRunner().invoke(command, ["nllb-clip", "--device", "tpu"])
    assert result.exit_code == 1
    assert "Device 'tpu' is unknown" in result.output


@pytest.mark.parametrize("name", ["retrieval", "zeroshot"])
def test_recall_is_measured_on_the_named_gpu(name: str, doubles: Doubles, tmp_path: Path) -> None:
    export = ("export", str(CHECKPOINTS / "nllb-clip"), str(tmp_path / "repository"), "--engine", "cuda")
    said(*export, "--captions-per-language", "1", "--texts-per-language", "1", code=0)
    model = (
        "--checkpoint",
        str(CHECKPOINTS / "nllb-clip"),
        "--model",
        str(tmp_path / "repository/nllb-clip"),
    )
    command = importlib.import_module(f"bench.{name}").app
    result = CliRunner().invoke(command, [*model, "--engine", "cuda", "--device", "cuda:7"])
    assert result.exit_code == 1
    assert "GPU 7 is not available" in result.output


def test_an_export_is_measured_on_the_named_gpu_alone(doubles: Doubles, tmp_path: Path) -> None:
    said(
        *("export", str(CHECKPOINTS / "nllb-clip"), str(tmp_path / "repository"), "--engine", "cuda"),
        *("--device", "cuda:1", "--captions-per-language", "1", "--texts-per-language", "1"),
        code=0,
    )
    assert doubles[1].device_ids == {"1"}
    (variant,) = Manifest.read(tmp_path / "repository" / "nllb-clip").variants.values()
    assert variant.measured_on["gpu"] == "NVIDIA L4"
    (encoder,) = local_models(tmp_path / "repository", "pt", device="cuda:0")
    assert doubles[1].device_ids == {"0", "1"}
    encoder.close()


def test_a_device_that_applies_to_nothing_is_refused(doubles: Doubles, tmp_path: Path) -> None:
    export = ("export", str(CHECKPOINTS / "nllb-clip"), str(tmp_path / "repository"))
    cuda = ("--engine", "cuda")
    assert "Device cuda:1 applies to no variant of this export; add --engine cuda" in said(
        *export, "--device", "cuda:1"
    )
    assert "fp32_cuda is built and measured on a GPU; pass --device cuda:N" in said(
        *export, *cuda, "--device", "cpu"
    )
    assert "GPU 7 is not available" in said(*export, *cuda, "--device", "cuda:7")
    assert "Device 'gpu' is unknown; expected 'cpu', 'cuda' or 'cuda:N'" in said(
        *export, *cuda, "--device", "gpu"
    )
    assert not (tmp_path / "repository").exists()


def test_serving_takes_a_device_in_process_only(exported: Exported) -> None:
    repository = str(exported("nllb-clip").parent)
    assert "--device is for --in-process" in said("serve", repository, "--device", "cuda")
    assert "--device is set on the server" in said("serve", "grpc://h/n", "--http-api", "--device", "cuda")
    assert "--device" in said("serve", repository, "--target", "gpu", "--device", "cuda")
    assert "Device 'tpu' is unknown" in said(
        "serve", repository, "--http-api", "--in-process", "--device", "tpu", "--port", "0"
    )
