"""What the extras of ``pyproject.toml`` bring: one build of ONNX Runtime, and engines that can be listed."""

from __future__ import annotations

import json
import subprocess
import venv
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version
from sample_models import ROOT

from runtime.backends.plans import TENSORRT_MAJORS

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
WITH_CPU = {"cpu", "dev", "unit", "samples"}
"""Extras that are for developers bring the build for CPUs; those for users leave the choice."""


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of an install with extras, by name; the project's own extras are followed."""
    found: dict[str, Requirement] = {}
    todo = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == "babeltower":
            todo += [line for extra in requirement.extras for line in EXTRAS[extra]]
        else:
            found[requirement.name] = requirement
    return found


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_one_build_of_onnxruntime_at_most(extra: str) -> None:
    builds = {name for name in requirements(extra) if name.startswith("onnxruntime")}
    expected = {"onnxruntime-gpu"} if extra == "gpu" else {"onnxruntime"} if extra in WITH_CPU else set()
    assert builds == expected


def test_any_extra_for_users_can_be_combined_with_the_gpu() -> None:
    users = sorted(set(EXTRAS) - WITH_CPU)
    for pair in combinations(users, 2):
        builds = {name for name in requirements("gpu", *pair) if name.startswith("onnxruntime")}
        assert builds == {"onnxruntime-gpu"}, pair
    assert not {name for name in requirements() if name.startswith("onnxruntime")}


def test_the_gpu_extra_brings_cuda_and_its_libraries() -> None:
    found = requirements("gpu")
    assert found["onnxruntime-gpu"].extras == {"cuda", "cudnn"}
    specifier = found["onnxruntime-gpu"].specifier
    admitted = [
        version for version in ("1.20.1", "1.24.2", "1.28.0", "1.31.1") if specifier.contains(version)
    ]
    assert admitted == ["1.28.0", "1.31.1"]  # 1.24 sums the variance of SkipLayerNormalization in FP16
    assert "cuda-bindings" in found


def test_the_tensorrt_extra_admits_the_majors_that_are_supported() -> None:
    found = requirements("tensorrt")
    versions = ["8.6.1", "10.9.0.34", "10.16.1.11", "11.0.0.114", "11.4.0.106", "12.0.0.1"]
    admitted = [version for version in versions if found["tensorrt"].specifier.contains(version)]
    assert {Version(version).major for version in admitted} == set(TENSORRT_MAJORS)
    assert requirements("gpu")["cuda-bindings"].specifier == found["cuda-bindings"].specifier


def test_the_pinned_builds_are_of_one_version() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert pins["onnxruntime"] == pins["onnxruntime-gpu"]
    server = (ROOT / "runtime" / "server" / "requirements.txt").read_text().splitlines()
    assert f"onnxruntime=={pins['onnxruntime']}" in server
    assert not [line for line in server if line.startswith("onnxruntime-gpu")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "runs"),
    [
        ("openvino", {"openvino"}),
        ("gpu", {"onnxruntime"}),
        ("gpu,openvino", {"onnxruntime", "openvino"}),
    ],
)
def test_a_new_environment_says_what_it_runs(extras: str, runs: set[str], tmp_path: Path) -> None:
    """From the registry, on a machine without a GPU: up to 3 GB. TensorRT's libraries are not there."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
        "-e",
        f"{ROOT}[{extras}]",
    ]
    subprocess.run(install, check=True, capture_output=True)
    subprocess.run([python, "-m", "pip", "check"], check=True, capture_output=True)
    command = [python, "-m", "babeltower", "engines", "--json"]
    listed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    reports = {report["engine"]: report for report in json.loads(listed.stdout)}
    assert {engine for engine, report in reports.items() if report["devices"]} == runs
    reasons = {engine: report["reason"] for engine, report in reports.items() if not report["devices"]}
    assert all(reasons.values())
    if "gpu" in extras:  # its libraries load; what is missing is the GPU
        assert "is not available: CUDA reports" in reasons["cuda"]
    else:
        assert "'babeltower[gpu]'" in reasons["cuda"]
