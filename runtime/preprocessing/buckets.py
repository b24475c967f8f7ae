"""Shapes that towers run in on a GPU: a few lengths and numbers of rows, to which batches are padded.

Kernels are tuned, and CUDA graphs captured, for one shape each. Padding to a short list of shapes keeps
captures few, and costs little: rows are dealt out so that runs are full.
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
    "GPU_BATCH_IMAGES",
    "GPU_BATCH_TOKENS",
    "GPU_RUN_OVERHEAD",
    "BucketRun",
    "Buckets",
    "image_buckets",
    "text_buckets",
]

CONTEXT_LENGTH = "babeltower.context_length"
"""Metadata of a text tower's graph: the longest text, in tokens."""

GPU_BATCH_IMAGES = 128
"""Images that are decoded and run at once on a GPU; more gain nothing."""

GPU_BATCH_TOKENS = 16_384
"""Rows × length of the largest text run on a GPU."""

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
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    max_tokens: int
    overhead: int

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

        The rows of one length are split into the shapes with the fewest tokens plus ``overhead`` a run.
        Room left in a run takes the next shorter rows, which cost nothing there.

        Args:
            lengths: Tokens of each row; for images, ones.

        Raises:
            InputError: a row is longer than every bucket.
        """
        found = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
        if len(found) and found.max() > self.lengths[-1]:
            self.length_of(int(found.max()))
        bucket = np.searchsorted(self.lengths, found)
        order = np.argsort(-found, kind="stable")
        ends = np.searchsorted(-bucket[order], -np.arange(len(self.lengths)), side="right")
        runs: list[BucketRun] = []
        at = 0
        for index in range(len(self.lengths) - 1, -1, -1):
            length = self.lengths[index]
            while at < ends[index]:
                rows = _split(int(ends[index]) - at, self.rows_at(length), length, self.overhead)
                runs.append(BucketRun(order[at : at + rows], rows, length))
                at += rows
        return runs


def text_buckets(
    context_length: int, *, max_rows: int | None = None, max_tokens: int = GPU_BATCH_TOKENS
) -> Buckets:
    """Return the shapes of a text tower; its context length is the last of the lengths.

    Args:
        max_rows: Maximum rows of a run, itself a bucket; ``None`` allows 512.
        max_tokens: Maximum rows × length of a run.
    """
    lengths = (*(length for length in _LENGTHS if length < context_length), context_length)
    return Buckets(lengths, _rows(max_rows), max_tokens, GPU_RUN_OVERHEAD)


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
