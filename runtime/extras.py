"""The libraries of the ``index`` extra, imported at their first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from runtime.errors import EngineError

__all__ = ["faiss", "parquet", "pyarrow"]


def pyarrow() -> Any:
    """Apache Arrow.

    Raises:
        EngineError: it is not installed; so of the others.
    """
    return _imported("pyarrow", "pyarrow")


def parquet() -> Any:
    """Apache Arrow's Parquet files."""
    return _imported("pyarrow.parquet", "pyarrow")


def faiss() -> Any:
    """FAISS."""
    return _imported("faiss", "faiss-cpu")


def _imported(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(
            f"{distribution} cannot be imported ({error}). Install what indexes need with "
            "pip install 'babeltower[index]'."
        ) from error
