"""Every name that our code uses of TensorRT exists in the bindings of 10.x and of 11.x.

The bindings are real wheels of some megabytes; the libraries behind them are not installed. Stub libraries
let the bindings be imported, which lists their classes, methods and signatures, and runs nothing. The names
are read from our own source: attributes of variables that hold TensorRT's objects.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.tensorrt import engine as builder_module
from runtime.backends import tensorrt as backend_module
from runtime.backends.plans import Portability

RELEASES = {10: "tensorrt_cu12_bindings==10.13.3.9", 11: "tensorrt_cu13_bindings==11.4.0.106"}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)

HOLDS = {
    "tensorrt": "",
    "library": "",
    "_library": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "flags": "BuilderFlag",
    "parser": "OnnxParser",
    "error": "ParserError",
    "made": "IOptimizationProfile",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "get_timing_cache": "ITimingCache",
}
"""Variable, attribute or method of our code → class of what it holds; empty for the module itself."""

ONLY_IN_10 = {"NetworkDefinitionCreationFlag.STRONGLY_TYPED"}
"""Used behind a check of the release: networks of 11.x are always strongly typed."""

ONLY_IN_RTX = {"_aim"}
"""Functions of ours that only ahead-of-time builds with TensorRT-RTX call."""

_DUMP = """
import inspect, json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
names = {}
for name in dir(trt):
    value = getattr(trt, name)
    names[name] = ""
    if inspect.isclass(value):
        for member in dir(value):
            names[f"{name}.{member}"] = getattr(getattr(value, member, None), "__doc__", None) or ""
print(json.dumps({"version": trt.__version__, "names": names}))
"""


@dataclass(frozen=True)
class Use:
    """One use in our code: a dotted name, and the number of arguments if it is called with a known one."""

    name: str
    n_arguments: int | None
    where: str


def uses() -> list[Use]:
    """Every attribute of TensorRT's module and objects in our code."""
    return [use for module in (builder_module, backend_module) for use in _uses(Path(module.__file__))]


def _uses(path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        child
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in ONLY_IN_RTX
        for child in ast.walk(function)
    }
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node not in skipped
            and (owner := _owner(node.value)) is not None
        ):
            name = f"{owner}.{node.attr}" if owner else node.attr
            call = calls.get(node)
            unknown = call is None or any(isinstance(argument, ast.Starred) for argument in call.args)
            n_arguments = None if call is None or unknown else len(call.args) + len(call.keywords)
            yield Use(name, n_arguments, f"{path.name}:{node.lineno}")


def _owner(value: ast.expr) -> str | None:
    """Class, or name in the module, that an attribute is read from; None if it is not TensorRT's."""
    if isinstance(value, ast.Call):
        return HOLDS.get(value.func.attr) if isinstance(value.func, ast.Attribute) else None
    if isinstance(value, ast.Name):
        return HOLDS.get(value.id)
    if isinstance(value, ast.Attribute):
        held = HOLDS.get(value.attr)
        if held is not None:
            return held
        inner = _owner(value.value)
        return value.attr if inner == "" and value.attr[0].isupper() else None
    return None


@pytest.fixture(scope="module", params=RELEASES, ids=lambda major: f"{major}.x")
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Names and docstrings of a release's bindings."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    folder, major = tmp_path_factory.mktemp("bindings"), request.param
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, RELEASES[major]], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"pip cannot download {RELEASES[major]}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True
        )
    listed = subprocess.run(
        [sys.executable, "-c", _DUMP, folder],
        env={"LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: Mapping[str, Any] = json.loads(listed.stdout)
    assert found["version"].startswith(f"{major}.")
    return found


def test_our_code_is_read() -> None:
    names = {use.name for use in uses()}
    assert len(names) >= 40
    assert {
        "Builder.build_serialized_network",
        "IBuilderConfig.builder_optimization_level",
        "ITimingCache.serialize",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.streamable_weights_size",
        "ProfilingVerbosity.DETAILED",
        "BuilderFlag.VERSION_COMPATIBLE",
    } <= names


def test_every_name_exists(bindings: Mapping[str, Any]) -> None:
    is_10 = bindings["version"].startswith("10.")
    missing = {
        use.name: use.where
        for use in uses()
        if use.name not in bindings["names"] and (is_10 or use.name not in ONLY_IN_10)
    }
    assert not missing


def test_every_call_has_as_many_arguments_as_a_signature_takes(bindings: Mapping[str, Any]) -> None:
    wrong = []
    for use in uses():
        signatures = _signatures(use.name, bindings["names"].get(use.name, ""))
        n = use.n_arguments
        if n is not None and use.name.endswith(".__init__"):
            n -= 1  # called on the class, with the object itself
        if n is not None and signatures and not any(least <= n <= most for least, most in signatures):
            wrong.append((use, signatures))
    assert not wrong


def _signatures(name: str, docstring: str) -> list[tuple[int, int]]:
    """Least and most arguments of each overload, without ``self``, as pybind writes them."""
    method = name.rpartition(".")[2]
    found = []
    for line in docstring.splitlines():
        _, is_one, rest = line.partition(f"{method}(self: ")
        if not is_one or ") ->" not in rest:
            continue
        arguments = _split(rest[: rest.rindex(") ->")])[1:]
        if any(argument.startswith("*") for argument in arguments):
            continue
        found.append((sum("=" not in argument for argument in arguments), len(arguments)))
    return found


def _split(arguments: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[({<") - (character in "])}>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def test_every_portability_has_a_level(bindings: Mapping[str, Any]) -> None:
    for portability in Portability:
        if portability is not Portability.NONE:
            level = portability.value.upper().replace("-", "_")
            assert f"HardwareCompatibilityLevel.{level}" in bindings["names"]


def test_signatures_are_read() -> None:
    line = (
        "set_shape(self: trt.IOptimizationProfile, input: str, min: trt.Dims, opt: trt.Dims = (1, 2)) -> None"
    )
    assert _signatures("IOptimizationProfile.set_shape", line) == [(2, 3)]
