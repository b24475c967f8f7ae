"""The list of engines: what runs here, and for the others the reason and the remedy in one line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from runtime.backends import engine_reports as module
from runtime.backends.engine_reports import EngineReport, engine_reports
from runtime.backends.plans import DeviceFacts
from runtime.commands.app import app
from runtime.errors import EngineError, MissingPackageError
from runtime.manifest import Engine, Precision


def reports() -> dict[Engine, EngineReport]:
    return {report.engine: report for report in engine_reports()}


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    def facts(index: int = 0) -> DeviceFacts:
        if index >= len(capabilities):
            raise EngineError(f"GPU {index} is not available: no CUDA-capable device is detected.")
        return DeviceFacts(f"GPU {index}", capabilities[index], "13.0")

    monkeypatch.setattr(module, "gpu_facts", facts)


def test_every_engine_is_reported_once() -> None:
    found = engine_reports()
    assert sorted(report.engine for report in found) == sorted(Engine)
    for report in found:
        assert bool(report.reason) is not bool(report.devices)
        assert "\n" not in report.reason
    by_engine = reports()
    assert by_engine[Engine.ONNXRUNTIME].precisions[:2] == (Precision.FP32, Precision.FP16)
    assert by_engine[Engine.ONNXRUNTIME].package.startswith("onnxruntime")


def test_a_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    found = reports()
    assert "pip install 'babeltower[openvino]'" in found[Engine.OPENVINO].reason
    assert "pip install 'babeltower[tensorrt]'" in found[Engine.TENSORRT].reason

    def no_gpu_build() -> None:
        raise MissingPackageError("CUDA needs onnxruntime-gpu,\nwhich is not installed.")

    monkeypatch.setattr(module, "preload", no_gpu_build)
    assert reports()[Engine.CUDA].reason == "CUDA needs onnxruntime-gpu, which is not installed."


@pytest.mark.parametrize(
    ("capability", "computed"), [("7.5", "fp32 fp16"), ("8.0", "fp32 fp16 bf16"), ("9.0", "fp32 fp16 bf16")]
)
def test_gpus_are_listed_with_what_they_compute(
    monkeypatch: pytest.MonkeyPatch, capability: str, computed: str
) -> None:
    monkeypatch.setattr(module, "preload", lambda: None)
    precisions = [Precision.FP32, Precision.FP16, Precision.BF16]
    monkeypatch.setattr(
        module, "require_computes", lambda engine, p: None if p in precisions else _refuse(p.value)
    )
    with_gpus(monkeypatch, "7.0", capability)
    report = reports()[Engine.CUDA]
    assert report.devices == ("cuda:0 (GPU 0)", "cuda:1 (GPU 1)")
    assert " ".join(report.precisions) == computed


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "preload", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
    with_gpus(monkeypatch)
    for engine in (Engine.CUDA, Engine.TENSORRT):
        assert "no CUDA-capable device" in reports()[engine].reason


@pytest.mark.parametrize(
    ("version", "supported"), [("9.3.0", False), ("10.16.1", True), ("11.4", True), ("12.0", False)]
)
def test_other_major_versions_of_tensorrt_are_refused_by_number(
    monkeypatch: pytest.MonkeyPatch, version: str, supported: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with_gpus(monkeypatch, "9.0")
    report = reports()[Engine.TENSORRT]
    assert bool(report.devices) is supported
    if supported:
        assert set(report.precisions) == set(Precision)
    else:
        assert (
            f"TensorRT {version} is installed; babeltower supports the major versions 10 and 11."
            in report.reason
        )


def test_libraries_that_do_not_load_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(module, "import_optional", broken)
    assert "cannot be loaded (libnvinfer.so.11" in reports()[Engine.TENSORRT].reason


def test_the_command_prints_a_line_for_each_engine() -> None:
    result = CliRunner().invoke(app, ["engines"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["onnxruntime", "openvino", "cuda", "tensorrt"]
    assert " on cpu (" in lines[0]
    assert "cannot run: " in lines[2]
    found = json.loads(CliRunner().invoke(app, ["engines", "--json"]).stdout)
    assert found[0]["engine"] == "onnxruntime"
    assert found[0]["precisions"][0] == "fp32"


def _refuse(precision: str) -> None:
    raise EngineError(f"{precision} is not supported.")
