"""Request to make one tower's graph in a precision, from its FP32 graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.precision.calibration import CalibrationSet
from export.precision.int8 import Int8Recipe
from runtime.manifest import Modality

__all__ = ["GraphRequest", "MakeGraph"]


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """Inputs for building one tower's graph.

    Attributes:
        source: FP32 graph.
        target: ONNX file to write; large weights go to the external data file ``data_name`` beside it.
        max_batch_size: Maximum rows of a batch, for plans with fixed shape ranges.
        context_length: Maximum text length in tokens, for the same.
        calibration: Calibration set; None if the form does not need it.
        recipe: Quantization recipe; None for the engine's default.
        kept_rows: Rows of the token table to keep in the finished graph; None for all. Calibration runs on
            the whole table. Only a maker of plans, built from the finished graph, removes the others itself.
    """

    modality: Modality
    source: Path
    target: Path
    data_name: str
    max_batch_size: int
    context_length: int
    calibration: CalibrationSet | None = None
    recipe: Int8Recipe | None = None
    kept_rows: NDArray[np.int64] | None = None


MakeGraph = Callable[[GraphRequest], Mapping[str, Any]]
