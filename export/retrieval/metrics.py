"""Exact retrieval recall and embedding agreement in numpy.

Ranking: items are sorted by descending dot product; **equal scores are sorted by ascending item index**.
Equal item vectors always get equal scores: each distinct vector is multiplied only once, since the result of
a matrix product may depend on a row's position.

There are two protocols, and a summary of either:

- ``any``: a query scores 1 if any of its relevant items is in the top k, as in the CLIP papers and
  CLIP_benchmark.
- ``fraction``: a query scores the share of its relevant items in the top k, which is recall in the strict
  sense. With five captions per image, image→text at k=1 cannot exceed 0.2.
- mean recall: the mean over k = 1, 5, 10. CAPIVARA reports this for ``any``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import row_cosines

__all__ = [
    "KS",
    "Float",
    "Int",
    "Recall",
    "Relevance",
    "RetrievalProtocol",
    "VectorAgreement",
    "agreement",
    "any_hits",
    "decision_margins",
    "recall",
    "top_items",
    "top_overlap",
]

Float = NDArray[np.float32]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

KS = (1, 5, 10)
"""Cut-offs reported in the CLIP papers."""

_BLOCK_SCORES = 1 << 23
"""Maximum number of scores in memory at once (float32: 32 MiB)."""

_GROUPS = 128


class RetrievalProtocol(str, Enum):
    """Scoring of a query with several relevant items."""

    ANY = "any"
    FRACTION = "fraction"


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """Relevance pairs, many to many: item ``items[i]`` is relevant to query ``queries[i]``.

    Args:
        queries: Query indices, int64 (pairs,), below ``n_queries``.
        items: Item indices, int64 (pairs,), below ``n_items``; each pair must be unique.
    """

    queries: Int
    items: Int
    n_queries: int
    n_items: int

    def __post_init__(self) -> None:
        if self.queries.shape != self.items.shape or self.queries.ndim != 1:
            raise ValueError(
                f"queries and items have shapes {self.queries.shape} and {self.items.shape}; expected two "
                "one-dimensional arrays of equal length."
            )
        _check_range("queries", self.queries, self.n_queries)
        _check_range("items", self.items, self.n_items)
        if np.unique(self._keys()).size != self.queries.size:
            raise ValueError("A query–item pair occurs twice; give each pair once.")

    def reversed(self) -> Relevance:
        """Swap queries and items."""
        return Relevance(self.items, self.queries, self.n_items, self.n_queries)

    def n_answers(self) -> Int:
        """Count the relevant items per query, int64 (n_queries,)."""
        return np.bincount(self.queries, minlength=self.n_queries).astype(np.int64)

    def hits(self, top: Int) -> Bool:
        """Mark the relevant items among ranked items (n_queries, k), as bool (n_queries, k)."""
        wanted = np.arange(self.n_queries, dtype=np.int64)[:, None] * self.n_items + top
        return np.isin(wanted, self._keys())

    def _keys(self) -> Int:
        return self.queries.astype(np.int64) * self.n_items + self.items


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall at each k, as shares in [0, 1]; ``n_queries`` excludes queries without relevant items."""

    at: Mapping[int, float]
    n_queries: int

    @property
    def mean(self) -> float:
        """Mean recall over the cut-offs."""
        return sum(self.at.values()) / len(self.at)


@dataclass(frozen=True, slots=True)
class VectorAgreement:
    """Row-wise agreement of two sets of vectors.

    ``cosine_p1`` is the 1st percentile; ``worst_row`` is the row of ``cosine_min``; ``max_abs_diff`` is over
    all components.
    """

    n_rows: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    max_abs_diff: float
    worst_row: int


def top_items(queries: Float, items: Float, k: int = max(KS)) -> Int:
    """Return the top k items of each query, computed block by block.

    Args:
        queries: float32 (n_queries, dim).
        items: float32 (n_items, dim); ``k`` is capped at ``n_items``.

    Returns:
        int64 (n_queries, k): item indices, best first; equal scores by ascending index.
    """
    k = min(k, len(items))
    top = np.empty((len(queries), k), dtype=np.int64)
    for start, scores in _score_blocks(queries, items):
        top[start : start + len(scores)] = _top_of_block(scores, k)
    return top


def recall(
    top: Int,
    relevance: Relevance,
    protocol: RetrievalProtocol = RetrievalProtocol.ANY,
    ks: tuple[int, ...] = KS,
) -> Recall:
    """Compute the recall of ranked items.

    Args:
        top: int64 (n_queries, ≥ max(ks)) from ``top_items``; fewer columns only if there are fewer items.

    Raises:
        ValueError: no query has a relevant item.
    """
    n_answers = relevance.n_answers()
    asked = n_answers > 0
    if not asked.any():
        raise ValueError("No query has a relevant item, so recall is undefined.")
    found = relevance.hits(top)[asked].cumsum(axis=1)
    at = {}
    for k in ks:
        n_found = found[:, min(k, found.shape[1]) - 1]
        share = np.minimum(n_found, 1) if protocol is RetrievalProtocol.ANY else n_found / n_answers[asked]
        at[k] = float(share.mean())
    return Recall(at, int(asked.sum()))


def any_hits(top: Int, relevance: Relevance, k: int) -> Bool:
    """Mark the queries with any relevant item in the top k, bool (n_queries,)."""
    hit: Bool = np.any(relevance.hits(top[:, :k]), axis=1)
    return hit


def decision_margins(queries: Float, items: Float, relevance: Relevance, rows: Int, k: int) -> Float:
    """Compute the score margin that decides the hit at k, for the given query rows.

    A query hits at k exactly if its best relevant item outranks the k-th best irrelevant item; the margin is
    the difference of these two scores. If scores change by at most e, a hit with a margin above 2e cannot
    change.

    Returns:
        float32 (rows,); infinite if fewer than k items are irrelevant, or none is relevant.
    """
    margins = np.full(len(rows), np.inf, dtype=np.float32)
    for place, row in enumerate(rows):
        scores = items @ queries[row]
        is_answer = np.zeros(len(items), dtype=np.bool_)
        is_answer[relevance.items[relevance.queries == row]] = True
        others = scores[~is_answer]
        if is_answer.any() and len(others) >= k:
            boundary = np.partition(others, len(others) - k)[len(others) - k]
            margins[place] = abs(scores[is_answer].max() - boundary)
    return margins


def top_overlap(reference: Int, exported: Int) -> float:
    """Return the mean share of the reference's top items (n, k) among the exported model's, in any order."""
    both = (reference[:, :, None] == exported[:, None, :]).any(axis=2)
    return float(both.mean())


def agreement(reference: Float, exported: Float) -> VectorAgreement:
    """Compare two sets of vectors (rows, dim) row by row, in float64.

    Zero or non-finite vectors give NaN cosines, which fail every limit; ``worst_row`` is the first such row.

    Raises:
        ValueError: the shapes differ, or there are no rows.
    """
    if reference.shape != exported.shape or reference.ndim != 2 or not len(reference):
        raise ValueError(
            f"Vectors to compare have shapes {reference.shape} and {exported.shape}; expected two equal "
            "shapes (rows, dim) with at least one row."
        )
    left, right = reference.astype(np.float64), exported.astype(np.float64)
    cosine = row_cosines(left, right)
    return VectorAgreement(
        n_rows=len(cosine),
        cosine_min=float(cosine.min()),
        cosine_p1=float(np.percentile(cosine, 1)),
        cosine_mean=float(cosine.mean()),
        max_abs_diff=float(np.abs(left - right).max()),
        worst_row=int(cosine.argmin()),
    )


def _score_blocks(queries: Float, items: Float) -> Iterator[tuple[int, Float]]:
    """Yield scores of blocks of queries against all items, multiplying each distinct item vector once."""
    first_row: dict[bytes, int] = {}
    place = np.array([first_row.setdefault(row.tobytes(), len(first_row)) for row in items], dtype=np.int64)
    distinct = np.ascontiguousarray(items[np.unique(place, return_index=True)[1]].T)
    step = max(1, _BLOCK_SCORES // len(items))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ distinct
        yield start, scores if distinct.shape[1] == len(items) else scores[:, place]


def _top_of_block(scores: Float, k: int) -> Int:
    rows, items = np.nonzero(scores >= _kth_score_floor(scores, k)[:, None])
    order = np.lexsort((items, -scores[rows, items], rows))
    rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(scores)))[rows]
    return items[order[rank < k]].reshape(len(scores), k)


def _kth_score_floor(scores: Float, k: int) -> Float:
    """Return a lower bound (rows,) on each row's k-th score: the k-th largest maximum of disjoint groups.

    With many more groups than k, few other scores exceed it, at a fraction of the cost of a full partition.
    """
    # k groups have a maximum of at least the bound, so at least k scores do
    n_rows, n_items = scores.shape
    n_groups = min(max(_GROUPS, 4 * k), n_items)
    width = n_items // n_groups
    maxima = scores[:, : n_groups * width].reshape(n_rows, width, n_groups).max(axis=1)
    return np.partition(maxima, n_groups - k, axis=1)[:, n_groups - k]


def _check_range(what: str, values: Int, stop: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() < stop):
        raise ValueError(
            f"{what} lie in [{values.min()}, {values.max()}]; expected at least 0 and below {stop}."
        )
