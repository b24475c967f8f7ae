"""Qualifying a GPU: refused plainly without one, and the whole way with stand-ins."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sample_models import CHECKPOINTS, NAMES
from small_exports import FEW
from tensorrt_double import RunningTensorRt, install
from typer import Typer
from typer.testing import CliRunner

from bench.gpu.tensorrt import Grid, forms_of_gpu, main, qualify
from bench.models.samples import sample_checkpoints
from bench.records.record import read_records, write_records
from export.variants import forms_for
from runtime.backends.plans import DeviceFacts
from runtime.manifest import Engine, Precision

ADA = DeviceFacts("NVIDIA L4", "8.9", "13.0")
GRID = Grid(batches=(1, 2, 1_000), sequences=(8, 9_999), repeats=3, warm_up=2)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RunningTensorRt:
    return install(monkeypatch)


@pytest.mark.parametrize("missing", ["tensorrt", "gpu"])
def test_without_a_gpu_it_says_so_and_fails(
    missing: str, library: RunningTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        monkeypatch.setattr(library.gpu, "_n_devices", 0)
    app = Typer()
    app.command()(main)
    record, repository = tmp_path / "gpu.json", tmp_path / "repository"
    done = CliRunner().invoke(app, ["--json", str(record), "--repository", str(repository)])
    assert done.exit_code == 1
    assert "cannot qualify a GPU; nothing was measured" in " ".join(done.output.split())
    remedy = "babeltower[tensorrt]" if missing == "tensorrt" else "machine with an NVIDIA GPU and driver"
    assert remedy in " ".join(done.output.split())
    assert not record.exists()
    assert not repository.exists()


def test_every_precision_that_the_gpu_has_is_built() -> None:
    assert sorted(form.key for form in forms_of_gpu(ADA)) == [
        "bf16_tensorrt",
        "fp16_tensorrt",
        "fp32_tensorrt",
        "fp8_tensorrt",
        "int8_tensorrt",
    ]
    ampere = forms_of_gpu(replace(ADA, compute_capability="8.6"))
    assert {form.precision for form in ampere} == set(Precision) - {Precision.FP8}
    turing = forms_of_gpu(replace(ADA, compute_capability="7.5"))
    assert {form.precision for form in turing} == {Precision.FP32, Precision.FP16, Precision.INT8}
    assert forms_of_gpu(replace(ADA, compute_capability="10.0")) == forms_of_gpu(ADA)


def test_every_sample_is_qualified() -> None:
    assert {path.name for path in sample_checkpoints()} == set(NAMES)


def test_what_passes_is_timed_and_what_fails_is_told(library: RunningTensorRt, tmp_path: Path) -> None:
    forms = forms_for([Precision.FP16], [Engine.TENSORRT], installed=[Engine.TENSORRT])
    options = replace(FEW, forms=forms)
    records, refusal = qualify(CHECKPOINTS / "capivara", tmp_path / "a", ADA, grid=GRID, options=options)
    assert refusal == ""
    shapes = {(record.cell["tower"], record.cell["shape"]) for record in records}
    assert shapes == {("image", "1"), ("image", "2")} | {
        ("text", f"{b}×{s}") for b in (1, 2) for s in (8, 77)
    }
    for record in records:
        assert (record.cell["variant"], record.unit, len(record.samples)) == ("fp16_tensorrt", "ms", 3)
        assert record.settings["name"] == "NVIDIA L4"
        assert set(record.settings["products"]) == {"Half"}
    write_records(records, tmp_path / "gpu.json")
    assert read_records(tmp_path / "gpu.json") == records
    library.noise = 0.3
    records, refusal = qualify(CHECKPOINTS / "capivara", tmp_path / "b", ADA, grid=GRID, options=options)
    assert records == []
    assert "capivara in fp16_tensorrt does not agree with PyTorch" in refusal
