"""The protocol of an opened graph: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

__all__ = ["Backend", "GraphBackend", "Signature", "TensorType"]


class Backend(Protocol):
    """An opened graph; ``run`` may be called from several threads at once."""

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs; they belong to the caller.

        Raises:
            EngineError: the engine rejects the inputs or fails while running.
        """

    def close(self) -> None:
        """Release the graph; safe to call more than once."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's numpy dtype name and shape; -1 marks a dynamic dimension."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of an opened graph, by name and in graph order."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]


class GraphBackend(Backend, Protocol):
    """A backend that reads an ONNX file and exposes its signature."""

    @property
    def signature(self) -> Signature:
        """Inputs and outputs as the engine reports them."""
