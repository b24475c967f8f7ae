"""Optional packages: imported at their first use; a missing one names the extra to install."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from runtime.errors import MissingPackageError

__all__ = [
    "faiss",
    "import_optional",
    "install_hint",
    "missing_package",
    "needing",
    "parquet",
    "pip_install",
    "pyarrow",
]

_EXTRA_OF = {
    "aiohttp": "client",
    "cuda": "gpu",
    "faiss": "index",
    "fsspec": "corpus",
    "gcsfs": "gs",
    "google": "client",
    "grpc": "client",
    "httptools": "gateway",
    "matplotlib": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "open_clip": "export",
    "openvino": "openvino",
    "peft": "export",
    "prometheus_client": "corpus",
    "pyarrow": "corpus",
    "pydantic": "gateway",
    "python_multipart": "gateway",
    "ray": "ray",
    "rich": "corpus",
    "s3fs": "s3",
    "safetensors": "export",
    "starlette": "gateway",
    "tensorrt": "tensorrt",
    "torch": "export",
    "torchvision": "export",
    "transformers": "export",
    "tritonclient": "client",
    "uvicorn": "gateway",
    "uvloop": "gateway",
}
"""The extra of ``pyproject.toml`` that brings each package."""

_DISTRIBUTION_OF = {"PIL": "pillow"}
"""Distributions that are not named as the package they bring."""

_EXTRA_ON_GPU_OF = {"onnxruntime": "gpu"}
"""The extra that brings a package in its build for NVIDIA GPUs, in place of the one for CPUs."""


def import_optional(module: str, what: str, install: str, *, remedy: str = "") -> Any:
    """Import a module of an optional package.

    Args:
        module: Its dotted name.
        what: The task or object that needs it, as a sentence's subject: ``"An index"``.
        install: What to pass to ``pip install``: ``babeltower[index]``.
        remedy: Another way out, appended to the message.

    Raises:
        MissingPackageError: the package is not installed, or cannot be loaded.
    """
    with needing(what, install, remedy=remedy):
        return import_module(module)


def install_hint(package: str) -> str:
    """Sentence that says how to install a package: with the extra that brings it, if there is one."""
    extra, on_gpu = _EXTRA_OF.get(package), _EXTRA_ON_GPU_OF.get(package)
    hint = _run_pip(f"babeltower[{extra}]" if extra else _DISTRIBUTION_OF.get(package, package))
    return f"{hint}, or with an NVIDIA GPU: {pip_install(f'babeltower[{on_gpu}]')}" if on_gpu else hint


def pip_install(requirement: str) -> str:
    """Command that installs a requirement, quoted for a shell."""
    return f"pip install '{requirement}'"


def missing_package(
    error: ImportError, what: str, install: str | None = None, *, remedy: str = ""
) -> MissingPackageError:
    """Error of a failed import; arguments as of ``import_optional``, by default with ``install_hint``."""
    package = (error.name or "a package").partition(".")[0]
    found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
    hint = install_hint(package) if install is None else _run_pip(install)
    return MissingPackageError(f"{what} needs {package}, which {found}. {hint}{remedy and f' {remedy}'}")


@contextlib.contextmanager
def needing(what: str, install: str, *, remedy: str = "") -> Iterator[None]:
    """Turn a failed import inside the block into one line that says what to install.

    Raises:
        MissingPackageError: an import failed; arguments as of ``import_optional``.
    """
    try:
        yield
    except ImportError as error:
        raise missing_package(error, what, install, remedy=remedy) from error


def pyarrow() -> Any:
    """Apache Arrow, for indexes and files of vectors.

    Raises:
        MissingPackageError: it is not installed.
    """
    return import_optional("pyarrow", "An index or a file of vectors", "babeltower[index]")


def parquet() -> Any:
    """Apache Arrow's Parquet files, of vectors or images; errors as of ``pyarrow``."""
    return import_optional("pyarrow.parquet", "A Parquet file", "babeltower[index]")


def faiss() -> Any:
    """FAISS; errors as of ``pyarrow``."""
    return import_optional("faiss", "An index", "babeltower[index]")


def _run_pip(install: str) -> str:
    return f"Run: {pip_install(install)}"
