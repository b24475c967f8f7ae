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
            EngineError: the engine refuses the inputs or fails while it runs.
        """

    def close(self) -> None:
        """Release the graph; may be called again."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """``dtype`` as numpy names it; -1 in ``shape`` where it is dynamic."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Tensors of an opened graph, by name, in its order."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]


class GraphBackend(Backend, Protocol):
    """A backend that read an ONNX file, and knows what is in it."""

    @property
    def signature(self) -> Signature:
        """What goes in and out, as the engine read it."""
