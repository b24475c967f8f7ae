"""Request to make one tower's graph in a precision, from its FP32 graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.precision.calibration import CalibrationSet
from export.precision.int8 import Int8Recipe
from runtime.manifest import Modality

__all__ = ["GraphRequest", "MakeGraph"]


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """One tower's graph to make.

    Attributes:
        source: The FP32 graph.
        target: ONNX file to write, its large weights beside it as ``data_name``.
        max_batch_size: Rows of the largest batch, for what is built for certain shapes.
        context_length: Tokens of the longest text, for the same.
        calibration: ``None`` where the form needs none.
        recipe: How to quantise; ``None`` for the engine's default.
    """

    modality: Modality
    source: Path
    target: Path
    data_name: str
    max_batch_size: int
    context_length: int
    calibration: CalibrationSet | None = None
    recipe: Int8Recipe | None = None


MakeGraph = Callable[[GraphRequest], Mapping[str, Any]]
