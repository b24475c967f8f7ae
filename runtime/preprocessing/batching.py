"""Batching of token rows by length, minimizing the cost of padding and runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.manifest import TextPreprocessing

__all__ = [
    "CPU_BATCH_TOKENS",
    "RUN_OVERHEAD",
    "TokenBatch",
    "batches_from_rows",
    "inputs_of_batch",
    "lengths_of_rows",
    "padded_batch",
    "runs_from_lengths",
    "windows",
]

T = TypeVar("T")

CPU_BATCH_TOKENS = 2_048
"""Rows × length of the largest text run on a CPU, unless the caller says otherwise."""

RUN_OVERHEAD = 8
"""Fixed cost of a tower's run, in tokens: on a CPU, each run reads the weights once more."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Padded batch of token rows of similar length.

    Attributes:
        positions: int64 (rows,): position of each row in the input.
        input_ids: int64 (rows, length), padded on the right.
        attention_mask: int64 (rows, length): 1 for tokens, 0 for padding.
        n_tokens: Number of tokens without padding.
    """

    positions: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    n_tokens: int

    @property
    def n_padding_tokens(self) -> int:
        """Number of padding tokens."""
        return int(self.input_ids.size) - self.n_tokens


def batches_from_rows(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_batch_tokens: int,
    multiple_of: int = 1,
    overhead: int = RUN_OVERHEAD,
) -> Iterator[TokenBatch]:
    """Batch rows of token ids, longest first, so that memory use peaks at the first batch.

    Args:
        rows: Token ids of each text.
        pad_id: Padding token id.
        max_batch_tokens: Maximum rows × padded length of a batch, in tokens; a longer row runs alone.
        multiple_of: The padded length is rounded up to a multiple of this.
        overhead: See ``runs_from_lengths``.

    Yields:
        Every row exactly once; ``positions`` restore the order.

    Raises:
        InputError: ``max_batch_tokens`` or ``multiple_of`` is below 1.
    """
    for name, value in (("max_batch_tokens", max_batch_tokens), ("multiple_of", multiple_of)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1.")
    lengths = [-(-len(row) // multiple_of) * multiple_of for row in rows]
    for run in runs_from_lengths(lengths, max_tokens=max_batch_tokens, overhead=overhead):
        yield padded_batch(rows, run, length=max(lengths[i] for i in run), pad_id=pad_id)


def runs_from_lengths(
    lengths: Sequence[int] | NDArray[np.int64],
    *,
    max_tokens: int,
    overhead: int,
    max_rows: int | None = None,
) -> list[NDArray[np.int64]]:
    """Split rows by length into runs, minimizing the cost of padding and runs.

    Every run is padded to its longest row. Rows of equal length stay together within the limits; among all
    such splits, dynamic programming over the distinct lengths finds the one with the fewest tokens plus
    ``overhead`` per run.

    Args:
        lengths: Tokens of each row.
        max_tokens: Maximum rows × longest row of a run; a longer row runs alone.
        overhead: Fixed cost of a run, in tokens.
        max_rows: Maximum rows of a run.

    Returns:
        Row positions of each run, longest rows first and equal lengths in row order.
    """
    sizes = lengths.tolist() if isinstance(lengths, np.ndarray) else list(lengths)
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)  # equal lengths keep their order
    longest: list[int] = []
    bounds: list[int] = []
    for place, row in enumerate(order):
        size = max(sizes[row], 1)
        if not longest or size != longest[-1]:
            longest.append(size)
            bounds.append(place)
    bounds.append(len(order))
    limit = len(order) if max_rows is None else max_rows
    most = [min(max(max_tokens // length, 1), limit) for length in longest]
    begins = _cheapest_split(longest, bounds, most, overhead)
    runs: list[NDArray[np.int64]] = []
    end = len(longest)
    while end:
        first = begins[end]
        rows = np.array(order[bounds[first] : bounds[end]], dtype=np.int64)
        parts = -(-len(rows) // most[first])
        runs = [*([rows] if parts == 1 else np.array_split(rows, parts)), *runs]
        end = first
    return runs


def _cheapest_split(
    longest: Sequence[int], bounds: Sequence[int], most: Sequence[int], overhead: int
) -> list[int]:
    """Return the first length of the last run of every cheapest split of the first lengths.

    A call has few lengths, for which NumPy takes longer than the arithmetic.
    """
    cost, begins = [0], [0]
    for end in range(1, len(longest) + 1):
        rows_end = bounds[end]
        best = best_cost = -1
        for first in range(end):
            n_rows = rows_end - bounds[first]
            found = cost[first] + n_rows * longest[first] + overhead * -(-n_rows // most[first])
            if best < 0 or found < best_cost:
                best, best_cost = first, found
        cost.append(best_cost)
        begins.append(best)
    return begins


def inputs_of_batch(batch: TokenBatch, names: Iterable[str]) -> dict[str, NDArray[np.int64]]:
    """Return a batch as the inputs of a text tower: ``input_ids``, and ``attention_mask`` if it has one."""
    arrays = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return {name: arrays[name] for name in names}


def lengths_of_rows(ids: NDArray[np.int64], preprocessing: TextPreprocessing) -> NDArray[np.int64]:
    """Return the length of each padded row of ids: up to its last token, or whole where padding is read."""
    if preprocessing.fixed_length:
        return np.full(len(ids), ids.shape[1])
    stands = ids != preprocessing.pad_id
    lengths: NDArray[np.int64] = ids.shape[1] - stands[:, ::-1].argmax(axis=1)
    return lengths


def padded_batch(
    rows: Sequence[Sequence[int]],
    positions: Sequence[int] | NDArray[np.int64],
    *,
    pad_id: int,
    length: int | None = None,
) -> TokenBatch:
    """Make one batch of the rows at ``positions``, padded to ``length``, or to the longest row."""
    places = np.asarray(positions, dtype=np.int64)
    chosen = [rows[place] for place in places.tolist()]
    sizes = [len(row) for row in chosen]
    if length is None:
        length = max(sizes, default=0)
    input_ids = np.full((len(chosen), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(chosen), length), dtype=np.int64)
    for i, (row, size) in enumerate(zip(chosen, sizes, strict=True)):
        input_ids[i, :size] = row
        attention_mask[i, :size] = 1
    return TokenBatch(places, input_ids, attention_mask, sum(sizes))


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Split an iterable lazily into lists of ``size``; the last may be shorter.

    Raises:
        InputError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError(f"The window or batch size is {size}; expected at least 1.")
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
