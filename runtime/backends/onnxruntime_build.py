"""Installed build of ONNX Runtime: ``onnxruntime`` for CPUs, or ``onnxruntime-gpu`` for NVIDIA GPUs too.

All builds write the module ``onnxruntime`` to one folder. With two of them installed, the later one has
overwritten the earlier, and uninstalling either breaks both; pip cannot prevent it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from runtime.errors import EngineError, MissingPackageError
from runtime.extras import missing_package, pip_install

__all__ = ["CUDA_PROVIDER", "import_onnxruntime", "installed_builds", "preload", "require_cuda_build"]

CUDA_PROVIDER = "CUDAExecutionProvider"

_MODULE = "onnxruntime"
_CPU, _GPU = "babeltower[cpu]", "babeltower[gpu]"
_BUILDS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-training",
    "onnxruntime-vitisai",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""Distributions that contain the module ``onnxruntime``."""


def installed_builds() -> dict[str, Path]:
    """Return the installed builds by distribution name, and the module folder of each."""
    found = {}
    for name in _BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = Path(str(importlib.metadata.distribution(name).locate_file(_MODULE))).resolve()
    return found


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, if exactly one build of it is installed.

    Raises:
        MissingPackageError: no build is installed, or its libraries cannot be loaded.
        EngineError: several builds share a folder, or files of the only one are missing; the message says
            what to uninstall.
    """
    builds = installed_builds()
    _require_one(builds)
    try:
        module = import_module(_MODULE)
    except ImportError as error:
        if builds and isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(_MODULE):
            raise _incomplete(builds) from error
        raise missing_package(error, "Running an ONNX file") from error
    if not hasattr(module, "InferenceSession"):
        raise _incomplete(builds)
    return module


def require_cuda_build() -> Any:
    """Import ONNX Runtime, and check that it is a build with CUDA; errors as of ``import_onnxruntime``.

    Raises:
        MissingPackageError: the installed build is for CPUs only; the message says what to install.
    """
    builds = installed_builds()
    if not builds and not _is_importable():
        raise missing_package(ModuleNotFoundError(name="onnxruntime-gpu"), "CUDA", _GPU)
    module = import_onnxruntime()
    if CUDA_PROVIDER not in module.get_available_providers():
        name = next(iter(builds), _MODULE)
        raise MissingPackageError(
            f"CUDA needs onnxruntime-gpu; the installed {name} {module.__version__} has no "
            f"{CUDA_PROVIDER}. Run: pip uninstall --yes {name} && {pip_install(_GPU)}"
        )
    return module


@lru_cache(maxsize=1)
def preload() -> Any:
    """Load the CUDA libraries that pip installed, before the first session on CUDA.

    The provider's own library path has no entry for them. Libraries of the system, or those that
    PyTorch has loaded, are used where pip installed none.

    Returns:
        The module ``onnxruntime``.

    Raises:
        MissingPackageError: see ``require_cuda_build``; or a CUDA library is missing or cannot be loaded.
    """
    module = require_cuda_build()
    if not hasattr(module, "preload_dlls"):
        raise MissingPackageError(
            f"CUDA needs onnxruntime-gpu 1.28 or newer; {module.__version__} is installed. "
            f"Run: {pip_install(_GPU)}"
        )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it reports failures by printing them
        module.preload_dlls()
    failures = [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    if failures:
        raise MissingPackageError(
            f"CUDA's libraries for onnxruntime-gpu {module.__version__} are incomplete: "
            f"{'; '.join(failures)}. Run: {pip_install(_GPU)}"
        )
    return module


def _require_one(builds: dict[str, Path]) -> None:
    by_folder: dict[Path, list[str]] = {}
    for name, folder in builds.items():
        by_folder.setdefault(folder, []).append(name)
    for folder, names in by_folder.items():
        if len(names) > 1:
            raise EngineError(
                f"{' and '.join(names)} are both installed in {folder}, and have overwritten each other's "
                f"files. Run: {_reinstall(names)}"
            )


def _incomplete(builds: dict[str, Path]) -> EngineError:
    names = list(builds) or [_MODULE]
    return EngineError(
        f"Files of {' and '.join(names)} are missing, as after uninstalling another build of ONNX Runtime. "
        f"Run: {_reinstall(names)}"
    )


def _reinstall(names: list[str]) -> str:
    wanted = _GPU if any(name.endswith("-gpu") for name in names) else _CPU
    other = f" (for CPUs only: {pip_install(_CPU)})" if wanted == _GPU else ""
    return f"pip uninstall --yes {' '.join(names)} && {pip_install(wanted)}{other}"


def _is_importable() -> bool:
    try:
        import_module(_MODULE)
    except ImportError:
        return False
    return True
