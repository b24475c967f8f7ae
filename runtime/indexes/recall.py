"""Measured recall and speed of an index, compared with exact search."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.indexes.exact import Nearest
from runtime.indexes.faiss_index import neighbours
from runtime.indexes.plan import Plan
from runtime.indexes.record import OperatingPoint
from runtime.indexes.shards import VectorShards
from runtime.indexes.space import Space

__all__ = ["IndexedRows", "K", "best_point", "points_from_index"]

K = 10

_ALONE = 100
"""Number of queries timed one at a time."""

_SAME_SCORE = 1e-6
"""Cosines this close count as equal: different float32 summation orders differ by as much."""

_GAIN = 0.001
"""Minimum gain in recall from doubling the effort; below it, no higher effort is tried."""


@dataclass(frozen=True, slots=True)
class IndexedRows:
    """Rows of the shards that an index holds: all except the held-out ones.

    Attributes:
        shards: Shards with all rows.
        held_out: int64, ascending: numbers of the held-out rows.
    """

    shards: VectorShards
    held_out: NDArray[np.int64]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the decoded vectors of rows, ascending and numbered as in the index."""
        held_before = np.searchsorted(self.held_out - np.arange(len(self.held_out)), rows, side="right")
        return self.shards.space.decoded(self.shards.rows(rows + held_before))


@dataclass(frozen=True, slots=True)
class _Trial:
    effort: int
    rows: NDArray[np.int64]
    search_ms: float
    queries_per_second: float


def points_from_index(
    index: Any,
    plan: Plan,
    queries: NDArray[np.float32],
    nearest: Nearest,
    rows: IndexedRows,
    *,
    effort: int | None,
) -> tuple[OperatingPoint, ...]:
    """Measure searches with rising effort until the recall stops improving.

    Args:
        queries: Decoded queries, float32 (queries, dim).
        nearest: True neighbours of the queries among the rows of the index.
        effort: Measure only this effort.
    """
    k = nearest.rows.shape[1]
    trials: list[_Trial] = []
    found = 0.0
    for attempt in [effort] if effort else plan.efforts() or [0]:
        trials.append(_trial(index, plan.space, queries, k, attempt))
        before, found = found, float(_among(trials[-1].rows, nearest.rows).mean())
        if len(trials) > 1 and found > 0 and found - before < _GAIN:
            break
    recalls = _recalls(trials, queries, nearest, rows)
    return tuple(
        OperatingPoint(trial.effort, recall, trial.search_ms, trial.queries_per_second)
        for trial, recall in zip(trials, recalls, strict=True)
    )


def best_point(points: Sequence[OperatingPoint], target_recall: float) -> OperatingPoint:
    """Return the lowest effort that reaches a recall; if none does, the lowest close to the best one."""
    reached = [point for point in points if point.recall >= target_recall]
    if reached:
        return reached[0]
    best = max(point.recall for point in points)
    return next(point for point in points if point.recall >= best - _GAIN)


def _trial(index: Any, space: Space, queries: NDArray[np.float32], k: int, effort: int) -> _Trial:
    alone = []
    for query in queries[:_ALONE]:
        started = time.perf_counter()
        neighbours(index, space, query[None], k=k, effort=effort or None)
        alone.append(time.perf_counter() - started)
    started = time.perf_counter()
    _, rows = neighbours(index, space, queries, k=k, effort=effort or None)
    together = time.perf_counter() - started
    return _Trial(effort, rows, 1e3 * statistics.median(alone), len(queries) / together)


def _recalls(
    trials: Sequence[_Trial], queries: NDArray[np.float32], nearest: Nearest, rows: IndexedRows
) -> list[float]:
    """Return each trial's recall; rows that may tie with the k-th are read once for all trials."""
    right = [_among(trial.rows, nearest.rows) for trial in trials]
    doubtful = [~good & (trial.rows >= 0) for trial, good in zip(trials, right, strict=True)]
    wanted = np.unique(np.concatenate([t.rows[d] for t, d in zip(trials, doubtful, strict=True)]))
    if len(wanted):
        vectors = rows.vectors(wanted)
        for trial, good, doubt in zip(trials, right, doubtful, strict=True):
            query, _ = np.nonzero(doubt)
            found = vectors[np.searchsorted(wanted, trial.rows[doubt])]
            scores = rows.shards.space.scale * np.einsum("ij,ij->i", queries[query], found)
            good[doubt] = scores >= nearest.scores[query, -1] - _SAME_SCORE
    return [float(good.mean()) for good in right]


def _among(found: NDArray[np.int64], true: NDArray[np.int64]) -> NDArray[np.bool_]:
    among: NDArray[np.bool_] = (found[:, :, None] == true[:, None, :]).any(axis=2)
    return among
