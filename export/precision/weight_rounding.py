"""Round a product's weights to 8-bit codes: to the nearest, or so that the errors cancel on real inputs.

``COMPENSATED`` is GPTQ (arXiv 2210.17323): a matrix's rows are rounded one after the other, and each row's
error is made good in the rows that are still to come, weighted by how the inputs move together.
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
"""Largest magnitude that is exact on every CPU: two products with uint8 activations fit into 16 bits.

x86 without VNNI adds pairs of products with saturation at 32,767, and 255 · 64 · 2 = 32,640.
"""

_DAMPING = 0.01
"""Added to the moments' diagonal, as a share of its mean, so that they can be inverted."""
_BLOCK = 64

Float64 = NDArray[np.float64]


class Rounding(str, Enum):
    """Ways to round weights to codes."""

    NEAREST = "nearest"
    COMPENSATED = "compensated"


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """Codes of a weight and the step between two of them.

    Attributes:
        codes: int8, in the weight's shape.
        scales: float32 (output channels,).
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


def rounded_weight(
    weight: NDArray[np.float32], axis: int, *, largest_code: int, moments: Float64 | None = None
) -> RoundedWeight:
    """Round with one scale for each output channel, zero point 0.

    Args:
        weight: A matrix, or the kernel of a convolution.
        axis: Axis of the output channels.
        largest_code: Largest magnitude of a code.
        moments: float64 (inputs, inputs), sums of products of the inputs that the weight is multiplied with;
            needs a matrix. ``None`` rounds to the nearest.
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
    """Codes of a matrix (inputs, outputs), the inputs of the largest moments first."""
    order = np.argsort(-np.diagonal(moments), kind="stable")
    rest = weight[order].astype(np.float64)
    feedback = _feedback(moments[np.ix_(order, order)])
    steps, codes = scales.astype(np.float64), np.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
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
    """Upper Cholesky factor of the inverse of the damped moments: how a row's error moves the next rows."""
    diagonal = np.diagonal(moments).copy()
    damped = moments.copy()
    never_seen = diagonal <= 0  # inputs that are always 0: their weights make no difference
    damped[never_seen, never_seen] = diagonal.mean() or 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * (diagonal.mean() or 1.0)
    factor: Float64 = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor
