"""Shapes that towers run in on a GPU: a few lengths and numbers of rows, to which batches are padded.

Kernels are tuned, and CUDA graphs captured, for one shape each. Padding to a short list of shapes keeps
captures few, and costs little: rows are dealt out so that runs are full.

Large runs need no CUDA graph, since their launches take less time than their work. Where rows of one length
fill a run, they run in exactly that shape, without padding: one number of rows per length, since a new shape
costs an engine a twentieth of a second.

A tower that packs its texts computes no padding: its runs have any shape, and no CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = [
    "CONTEXT_LENGTH",
    "EXACT_ROWS",
    "GPU_BATCH_IMAGES",
    "GPU_BATCH_TOKENS",
    "GPU_RUN_OVERHEAD",
    "PACKED_TEXT",
    "BucketRun",
    "Buckets",
    "image_buckets",
    "text_buckets",
]

CONTEXT_LENGTH = "babeltower.context_length"
"""Metadata of a text tower's graph: the longest text, in tokens."""

PACKED_TEXT = "babeltower.packed_text"
"""Metadata of a text tower's graph: it computes the tokens of all texts without padding."""

GPU_BATCH_IMAGES = 128
"""Images that are decoded and run at once on a GPU; more gain nothing."""

GPU_BATCH_TOKENS = 16_384
"""Rows × length of the largest text run on a GPU."""

EXACT_ROWS = 256
"""Least number of rows of a run that is not padded; see ``docs/decisions/0026-cuda.md``."""

GPU_RUN_OVERHEAD = 512
"""Fixed cost of a text tower's run on a GPU, in tokens: launches, and products too small to fill the GPU."""

_LENGTHS = (8, 16, 24, 32, 48, 64, 77, 96, 128, 192, 256, 384, 512)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class BucketRun:
    """One run: ``positions`` of its rows in the input, and the shape that they are padded to."""

    positions: NDArray[np.int64]
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """Lists of lengths and numbers of rows, ascending; images have the one length 1.

    Attributes:
        max_tokens: Maximum rows × length of a shape; one row of any length is always allowed.
        overhead: Fixed cost of a run, in tokens (images: in rows).
        exact_rows: Least rows of a run that has its rows' own length; ``None`` if every run is padded.
        packed: No run is padded, since the tower computes no padding; every run has its rows' own shape.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    max_tokens: int
    overhead: int
    exact_rows: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        for name, sizes in (("lengths", self.lengths), ("rows", self.rows)):
            if not sizes or min(sizes) < 1 or sorted(set(sizes)) != list(sizes):
                raise InputError(
                    f"The buckets' {name} are {sizes}; expected ascending numbers of at least 1."
                )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every (rows, length) that a run may have."""
        return tuple((rows, length) for length in self.lengths for rows in self.rows_at(length))

    def rows_at(self, length: int) -> tuple[int, ...]:
        """Numbers of rows that fit into ``max_tokens`` at a length."""
        return tuple(rows for rows in self.rows if rows * length <= self.max_tokens) or self.rows[:1]

    def is_exact(self, n_rows: int, n_tokens: int) -> bool:
        """Return whether a batch runs in its own shape, unpadded: packed, or a full run of its length."""
        if self.packed:
            return n_rows <= self._full(n_tokens)
        return self.exact_rows is not None and self.exact_rows <= n_rows == self._full(n_tokens)

    def most_rows(self, n_tokens: int) -> int:
        """Return the rows of the largest run of a length, padded or not.

        Raises:
            InputError: the length is longer than every bucket.
        """
        padded = self.rows_at(self.length_of(n_tokens))[-1]
        full = self._full(n_tokens)
        return full if self.is_exact(full, n_tokens) else padded

    def _full(self, n_tokens: int) -> int:
        return min(self.rows[-1], max(1, self.max_tokens // n_tokens))

    def length_of(self, n_tokens: int) -> int:
        """Return the shortest length that holds a row.

        Raises:
            InputError: the row is longer than every bucket.
        """
        for length in self.lengths:
            if n_tokens <= length:
                return length
        raise InputError(f"A row of {n_tokens} tokens is longer than the tower's {self.lengths[-1]}.")

    def shape_of(self, n_rows: int, n_tokens: int = 1) -> tuple[int, int]:
        """Return the smallest (rows, length) that holds a batch.

        Raises:
            InputError: the batch is larger than every shape.
        """
        length = self.length_of(n_tokens)
        for rows in self.rows_at(length):
            if n_rows <= rows:
                return rows, length
        raise InputError(
            f"A batch of {n_rows} rows of {n_tokens} tokens is larger than the largest shape, "
            f"{self.rows_at(length)[-1]} × {length}."
        )

    def runs(self, lengths: Sequence[int] | NDArray[np.int64]) -> list[BucketRun]:
        """Deal rows out to runs, longest first; rows of equal length keep their order.

        Rows of equal length that fill runs run unpadded. The others are split, by bucket, into the shapes
        with the fewest tokens plus ``overhead`` a run. Room left in a run takes the next shorter rows,
        which cost nothing there.

        Args:
            lengths: Tokens of each row; for images, ones.

        Raises:
            InputError: a row is longer than every bucket.
        """
        found = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
        if len(found) and found.max() > self.lengths[-1]:
            self.length_of(int(found.max()))
        order = np.argsort(-found, kind="stable")
        if self.packed:
            return self._packed_runs(found, order)
        runs, order = self._exact_runs(found, order)
        bucket = np.searchsorted(self.lengths, found)
        ends = np.searchsorted(-bucket[order], -np.arange(len(self.lengths)), side="right")
        at = 0
        for index in range(len(self.lengths) - 1, -1, -1):
            length = self.lengths[index]
            while at < ends[index]:
                rows = _split(int(ends[index]) - at, self.rows_at(length), length, self.overhead)
                runs.append(BucketRun(order[at : at + rows], rows, length))
                at += rows
        return runs

    def _packed_runs(self, lengths: NDArray[np.int64], order: NDArray[np.int64]) -> list[BucketRun]:
        """Cut rows in descending order of length into full runs, each as long as its longest row."""
        runs, at = [], 0
        while at < len(order):
            length = int(lengths[order[at]])
            part = order[at : at + self._full(length)]
            runs.append(BucketRun(part, len(part), length))
            at += len(part)
        return runs

    def _exact_runs(
        self, lengths: NDArray[np.int64], order: NDArray[np.int64]
    ) -> tuple[list[BucketRun], NDArray[np.int64]]:
        """Take unpadded runs out of rows in descending order of length; return them and the other rows."""
        runs: list[BucketRun] = []
        if self.exact_rows is None:
            return runs, order
        left = []
        for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
            length = int(lengths[rows[0]]) if len(rows) else 1
            most = self._full(length)
            n_full = len(rows) // most if most >= self.exact_rows else 0
            runs += [BucketRun(part, most, length) for part in rows[: n_full * most].reshape(n_full, most)]
            left.append(rows[n_full * most :])
        return runs, np.concatenate([order[:0], *left])


def text_buckets(
    context_length: int,
    *,
    max_rows: int | None = None,
    max_tokens: int = GPU_BATCH_TOKENS,
    exact_rows: int | None = None,
    packed: bool = False,
) -> Buckets:
    """Return the shapes of a text tower; its context length is the last of the lengths.

    Args:
        max_rows: Maximum rows of a run, itself a bucket; ``None`` allows 512.
        max_tokens: Maximum rows × length of a run.
        exact_rows: See ``Buckets``; for engines that run any shape.
        packed: See ``Buckets``; for towers that pack their texts.
    """
    lengths = (*(length for length in _LENGTHS if length < context_length), context_length)
    return Buckets(lengths, _rows(max_rows), max_tokens, GPU_RUN_OVERHEAD, exact_rows, packed)


def image_buckets(*, max_rows: int | None = None) -> Buckets:
    """Return the numbers of images that an image tower runs at once; arguments as of ``text_buckets``."""
    rows = _rows(max_rows)
    return Buckets((1,), rows, rows[-1], 1)


def _rows(max_rows: int | None) -> tuple[int, ...]:
    if max_rows is None:
        return _ROWS
    if max_rows < 1:
        raise InputError(f"max_rows is {max_rows}; expected at least 1.")
    return (*(rows for rows in _ROWS if rows < max_rows), max_rows)


@lru_cache(maxsize=4096)
def _split(n_rows: int, sizes: tuple[int, ...], length: int, overhead: int) -> int:
    """Return the rows of the first run of the cheapest split of ``n_rows`` rows of one length."""
    if n_rows >= sizes[-1]:
        return sizes[-1]
    cost = [0] + [0] * n_rows
    first = [0] * (n_rows + 1)
    for n in range(1, n_rows + 1):
        options = [(size * length + overhead + cost[max(0, n - size)], -size) for size in sizes]
        cost[n], negative = min(options)
        first[n] = -negative
    return first[n_rows]
