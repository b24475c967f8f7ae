"""Second moments of the inputs of matrix products on calibration batches, for GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.precision.clipping import Batches, tensors_of_batches

__all__ = ["Seen", "input_moments"]

_GROUP_BYTES = 1 << 30
"""Maximum size of the moments collected in one pass over the batches; large towers need several passes."""

Float64 = NDArray[np.float64]
Seen = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def input_moments(
    model: onnx_ir.Model, folder: Path, tensors: Mapping[str, Seen], batches: Batches
) -> Iterator[tuple[str, Float64]]:
    """Compute ``Σ x xᵀ`` over all rows of each tensor, without padding rows.

    Args:
        model: FP32 model; external weights are read from ``folder``. It is run during iteration, so do not
            modify it before the end.
        tensors: Function by name of a tensor (…, inputs), which returns its rows as the product uses them,
            that is, quantized and dequantized.
        batches: Inputs by name; at least one batch.

    Yields:
        Name and float64 (inputs, inputs), in the order of ``tensors``.
    """
    widths = _widths(model, tensors)
    for group in _groups(widths):
        found = {name: np.zeros((widths[name], widths[name])) for name in group}
        for batch, values in zip(batches, tensors_of_batches(model, folder, group, batches), strict=True):
            for name in group:
                rows = tensors[name](_rows(values[name], batch.get("attention_mask")))
                found[name] += rows.T @ rows
        while found:
            name = next(iter(found))
            yield name, found.pop(name)


def _rows(values: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.float32]:
    """Flatten a tensor to float32 (rows, inputs), without padding rows."""
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        values = values[mask == 1]
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)


def _widths(model: onnx_ir.Model, names: Mapping[str, Any]) -> dict[str, int]:
    shapes = {
        str(value.name): value.shape
        for node in model.graph
        for value in node.outputs
        if value.name in names and value.shape is not None
    }
    shapes |= {
        str(value.name): value.shape
        for value in model.graph.inputs
        if value.name in names and value.shape is not None
    }
    return {name: int(shapes[name][-1]) for name in names}  # type: ignore[arg-type]


def _groups(widths: Mapping[str, int]) -> Iterator[Sequence[str]]:
    group: list[str] = []
    n_bytes = 0
    for name, width in widths.items():
        if group and n_bytes + 8 * width**2 > _GROUP_BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(name)
        n_bytes += 8 * width**2
    if group:
        yield group
