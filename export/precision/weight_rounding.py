"""Round a product's weights to 8-bit codes, to the nearest or with GPTQ's error compensation.

``COMPENSATED`` is GPTQ (arXiv 2210.17323): the rows of a matrix are rounded one after the other, and each
row's error is compensated in the remaining rows, according to the second moments of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

__all__ = ["FULL_CODE", "PORTABLE_CODE", "RoundedWeight", "Rounding", "rounded_weight"]

FULL_CODE = 127
"""Largest magnitude of an int8 code, symmetric about 0."""

PORTABLE_CODE = 64
"""Largest magnitude of a code that is exact on every CPU: two products with uint8 activations fit in 16 bits.

x86 without VNNI adds pairs of products with saturation at 32,767, and 255 · 64 · 2 = 32,640.
"""

_DAMPING = 0.01
"""Damping added to the moments' diagonal, as a share of its mean, so that they can be inverted."""
_BLOCK = 64

Float64 = NDArray[np.float64]


class Rounding(str, Enum):
    """Rounding method of weights."""

    NEAREST = "nearest"
    COMPENSATED = "compensated"


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """Quantized weight.

    Attributes:
        codes: int8 codes, in the weight's shape.
        scales: float32 scales (output channels,).
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


def rounded_weight(
    weight: NDArray[np.float32], axis: int, *, largest_code: int, moments: Float64 | None = None
) -> RoundedWeight:
    """Round a weight with one scale per output channel and zero point 0.

    Args:
        weight: Matrix, or kernel of a convolution.
        axis: Axis of the output channels.
        largest_code: Largest magnitude of a code.
        moments: Second moments of the weight's inputs, float64 (inputs, inputs); only for a matrix. None
            rounds to the nearest.
    """
    axis %= weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / largest_code, 1).astype(np.float32)
    if moments is None:
        codes = np.rint(weight / scales)
    elif axis == 0:
        codes = _compensated(weight.T, scales.ravel(), moments, largest_code).T
    else:
        codes = _compensated(weight, scales.ravel(), moments, largest_code)
    return RoundedWeight(np.ascontiguousarray(codes, np.int8), scales.ravel())


def _compensated(
    weight: NDArray[np.float32], scales: NDArray[np.float32], moments: Float64, largest_code: int
) -> Float64:
    """Round a matrix (inputs, outputs) with GPTQ; return the codes."""
    # Largest moments first ("act-order"): while many rows are left to absorb the errors of important inputs.
    order = np.argsort(-np.diagonal(moments), kind="stable")
    rest = weight[order].astype(np.float64)
    feedback = _feedback(moments[np.ix_(order, order)])
    steps, codes = scales.astype(np.float64), np.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        # within a block each error is applied at once, to later blocks in one product: fewer memory passes
        errors = np.empty((end - start, rest.shape[1]))
        for row in range(start, end):
            codes[row] = np.clip(np.rint(rest[row] / steps), -largest_code, largest_code)
            errors[row - start] = (rest[row] - codes[row] * steps) / feedback[row, row]
            rest[row + 1 : end] -= np.outer(feedback[row, row + 1 : end], errors[row - start])
        rest[end:] -= feedback[start:end, end:].T @ errors
    found = np.empty_like(codes)
    found[order] = codes
    return found


def _feedback(moments: Float64) -> Float64:
    """Return the upper Cholesky factor of the inverse damped moments.

    Row i, divided by its diagonal, says how much of row i's error each later row must absorb.
    """
    # One factorisation replaces GPTQ's update of the inverse after every row.
    diagonal = np.diagonal(moments).copy()
    damped = moments.copy()
    never_seen = diagonal <= 0  # inputs that are always 0, whose weights have no effect
    damped[never_seen, never_seen] = diagonal.mean() or 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * (diagonal.mean() or 1.0)
    factor: Float64 = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor
