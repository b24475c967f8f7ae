"""Batching of token rows by length, minimizing the cost of padding and runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = [
    "CPU_BATCH_TOKENS",
    "RUN_OVERHEAD",
    "TokenBatch",
    "batches_from_rows",
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
    sizes = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    order = np.argsort(-sizes, kind="stable")
    longest, starts = np.unique(-sizes[order], return_index=True)
    longest, bounds = -longest, np.append(starts, len(order))
    most = np.maximum(max_tokens // longest, 1)
    if max_rows is not None:
        most = np.minimum(most, max_rows)
    cost = np.zeros(len(longest) + 1, dtype=np.int64)
    begin = np.zeros(len(longest) + 1, dtype=np.int64)
    for end in range(1, len(longest) + 1):
        n_rows = bounds[end] - bounds[:end]
        total = cost[:end] + n_rows * longest[:end] + overhead * -(-n_rows // most[:end])
        begin[end] = total.argmin()
        cost[end] = total[begin[end]]
    runs: list[NDArray[np.int64]] = []
    end = len(longest)
    while end:
        first = int(begin[end])
        rows = order[bounds[first] : bounds[end]]
        parts = -(-len(rows) // int(most[first]))
        runs = [*([rows] if parts == 1 else np.array_split(rows, parts)), *runs]
        end = first
    return runs


def padded_batch(
    rows: Sequence[Sequence[int]],
    positions: Sequence[int] | NDArray[np.int64],
    *,
    pad_id: int,
    length: int | None = None,
) -> TokenBatch:
    """Make one batch of the rows at ``positions``, padded to ``length``, or to the longest row."""
    if length is None:
        length = max((len(rows[position]) for position in positions), default=0)
    input_ids = np.full((len(positions), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(positions), length), dtype=np.int64)
    for i, position in enumerate(positions):
        row = rows[position]
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
    n_tokens = sum(len(rows[position]) for position in positions)
    return TokenBatch(np.asarray(positions, dtype=np.int64), input_ids, attention_mask, n_tokens)


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
