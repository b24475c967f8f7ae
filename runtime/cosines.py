"""Cosines of rows, with one definition for vectors that have no direction.

A zero or non-finite vector has no direction. Its cosine is NaN, which fails every limit
(``not cosine >= limit``) and is never left out of a minimum or a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = [
    "highest",
    "lowest",
    "lowest_cosine",
    "mean_cosine",
    "nan_first",
    "require_directions",
    "row_cosines",
    "row_lengths",
    "rows_without_direction",
    "unit_rows",
    "worst_rows",
]

_SHOWN = 5
"""Maximum number of rows listed in an error."""


def row_cosines(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine of each row with the same row of the other array, in float64.

    Args:
        found: Numeric vectors (rows, dim), of any norm.
        expected: Numeric vectors of the same shape.

    Returns:
        float64 (rows,), in -1..1; NaN if either vector is zero or not finite.

    Raises:
        InputError: the shapes differ, are not (rows, dim), or are empty.
    """
    if found.shape != expected.shape or found.ndim != 2 or not found.size:
        raise InputError(
            f"Vectors to compare have shapes {found.shape} and {expected.shape}; expected the same "
            "non-empty (rows, dim)."
        )
    cosines: NDArray[np.float64] = np.clip((_unit(found) * _unit(expected)).sum(axis=1), -1, 1)
    return cosines


def lowest_cosine(
    found: NDArray[Any], expected: NDArray[Any], *, names: Sequence[str] | None = None
) -> float:
    """Return the lowest cosine of the rows, all of which must have a direction.

    Raises:
        InputError: as in ``row_cosines``, or a vector is zero or not finite; the message names the rows.
    """
    cosines = row_cosines(found, expected)
    require_directions(found, names=names, what="compared vectors")
    require_directions(expected, names=names, what="reference vectors")
    return float(cosines.min())


def mean_cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the mean cosine of the rows, all of which must have a direction; errors as ``lowest_cosine``."""
    lowest_cosine(found, expected)
    return float(row_cosines(found, expected).mean())


def require_directions(vectors: NDArray[Any], *, what: str, names: Sequence[str] | None = None) -> None:
    """Check that every vector has a direction.

    Args:
        vectors: Numeric vectors (rows, dim).
        what: Description of the rows, for the error message.
        names: Names of the rows in the error message; default: their numbers.

    Raises:
        InputError: a row is zero or not finite.
    """
    rows = rows_without_direction(vectors)
    if len(rows):
        raise InputError(
            f"{len(rows)} of {len(vectors)} {what} are zero or not finite, and have no cosine: "
            f"{_listed(rows, names)}. A common cause is a precision that overflows; try a higher one."
        )


def rows_without_direction(vectors: NDArray[Any]) -> NDArray[np.int64]:
    """Return the numbers of the rows that are zero or not finite."""
    return np.flatnonzero(np.isnan(_unit(vectors)).any(axis=1))


def worst_rows(cosines: NDArray[np.float64], names: Sequence[str] | None = None) -> str:
    """Return the rows without a cosine, if any, otherwise the row with the lowest, in words."""
    undefined = np.flatnonzero(np.isnan(cosines))
    return _listed(undefined if len(undefined) else np.asarray([cosines.argmin()]), names)


def highest(values: Iterable[float]) -> float:
    """Return the highest value, or NaN if any value is NaN, which Python's ``max`` may miss.

    Raises:
        ValueError: there are none.
    """
    return float(np.max(np.asarray(list(values), dtype=np.float64)))


def lowest(values: Iterable[float]) -> float:
    """Return the lowest value, or NaN if any value is NaN, which Python's ``min`` may miss.

    Raises:
        ValueError: there are none.
    """
    return float(np.min(np.asarray(list(values), dtype=np.float64)))


def nan_first(value: float) -> float:
    """Return a sort key for ``min`` and ``sorted`` that orders NaN before everything."""
    return -math.inf if math.isnan(value) else float(value)


def unit_rows(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to length 1; a zero row stays zero and scores 0 with everything.

    Returns:
        float32 (rows, dim).

    Raises:
        InputError: a component is not finite.
    """
    floats = vectors.astype(np.float32)
    if not np.isfinite(floats).all():
        rows = np.flatnonzero(~np.isfinite(floats).all(axis=1))
        raise InputError(
            f"{len(rows)} of {len(floats)} vectors are not finite: {_listed(rows, None)}. Embed them again."
        )
    norms = np.linalg.norm(floats, axis=-1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(floats, norms, out=np.zeros_like(floats), where=norms > 0)
    return unit


def row_lengths(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return the length of each row, float32 (rows,); infinite or NaN for a row that is not finite."""
    lengths: NDArray[np.float32] = np.linalg.norm(vectors.astype(np.float32), axis=1)
    return lengths


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Scale rows to length 1, NaN if without direction; first by the maximum, since 1e-200² underflows."""
    rows = vectors.astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scales = np.where(np.isfinite(largest) & (largest > 0), largest, np.nan)
    rows = rows / scales
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _listed(rows: NDArray[np.int64], names: Sequence[str] | None) -> str:
    shown = [f"row {row}" if names is None else names[row] for row in rows[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
