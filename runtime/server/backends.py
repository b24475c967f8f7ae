"""Backend folder of the server: Triton's Python backend, and ours for the towers."""

from __future__ import annotations

import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path

from runtime.errors import EngineError
from runtime.manifest import GRAPH_ENGINES, Engine
from runtime.server.environment import ServerEnvironment

__all__ = ["write_backends"]


def write_backends(environment: ServerEnvironment, target: Path, *, stock: Path | None = None) -> None:
    """Fill ``target`` with the backends ``python``, ``onnxruntime`` and ``openvino``.

    Args:
        stock: Folder of Triton's own backends, ``NAME/libtriton_NAME.so``; those present are used instead of
            ours.

    Raises:
        EngineError: the environment has no Triton, or ``stock`` has no backend.
    """
    python = environment.triton / "backends" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = environment.triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not python.is_dir() or not stub.is_file():
        raise EngineError(
            f"{environment.folder} has no Triton for Python {version}. Delete it and start again."
        )
    shutil.copytree(python, target / "python", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(stub, target / "python" / stub.name)
    libraries = {} if stock is None else _libraries(stock)
    for engine in GRAPH_ENGINES:
        if engine in libraries:
            shutil.copytree(libraries[engine].parent, target / engine.value, symlinks=True)
        else:
            _write_backend(engine.value, target / engine.value)


def _libraries(stock: Path) -> dict[Engine, Path]:
    """Return the backend libraries in a folder."""
    wanted = {engine: stock / engine.value / f"libtriton_{engine.value}.so" for engine in GRAPH_ENGINES}
    found = {engine: path for engine, path in wanted.items() if path.is_file()}
    if not found:
        raise EngineError(f"{stock} has no backend; expected one of {[str(p) for p in wanted.values()]}.")
    return found


def _write_backend(name: str, folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "tests")
    for package in ("runtime", "triton_models"):
        with as_file(files(package)) as source:
            shutil.copytree(source, folder / "code" / package, ignore=ignored)
    with as_file(files("triton_models") / "backends" / name / "model.py") as source:
        shutil.copyfile(source, folder / "model.py")
