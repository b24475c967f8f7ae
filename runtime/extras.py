"""Libraries of the ``index`` extra, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from runtime.errors import EngineError

__all__ = ["faiss", "parquet", "pyarrow"]


def pyarrow() -> Any:
    """Import Apache Arrow.

    Raises:
        EngineError: it is not installed; the same holds for the other functions here.
    """
    return _imported("pyarrow", "pyarrow")


def parquet() -> Any:
    """Import Apache Arrow's Parquet module."""
    return _imported("pyarrow.parquet", "pyarrow")


def faiss() -> Any:
    """Import FAISS."""
    return _imported("faiss", "faiss-cpu")


def _imported(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(
            f"{distribution} cannot be imported ({error}). Install the dependencies of indexes with "
            "pip install 'babeltower[index]'."
        ) from error
