"""Token rows become padded batches: sorted by length, each within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = ["TokenBatch", "batches_from_rows", "padded_batch", "windows"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of like length.

    Attributes:
        positions: int64 (rows,): where each row stood in the input.
        input_ids: int64 (rows, length), padded on the right.
        attention_mask: int64 (rows, length): 1 at the row's own tokens, 0 at padding.
        n_tokens: the row's own tokens; the rest is padding.
    """

    positions: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    n_tokens: int

    @property
    def n_padding_tokens(self) -> int:
        """Tokens that are computed for nothing."""
        return int(self.input_ids.size) - self.n_tokens


def batches_from_rows(
    rows: Sequence[Sequence[int]], *, pad_id: int, max_batch_tokens: int, multiple_of: int = 1
) -> Iterator[TokenBatch]:
    """Batch rows of token ids, longest first, so that the first batch needs the most memory.

    Args:
        rows: Token ids of each text.
        pad_id: What fills a row up to the batch's length.
        max_batch_tokens: Rows × padded length of a batch, in tokens; a longer row runs alone.
        multiple_of: The padded length is rounded up to a multiple of this.

    Yields:
        Every row exactly once; ``positions`` restore the order.

    Raises:
        InputError: ``max_batch_tokens`` or ``multiple_of`` is below 1.
    """
    for name, value in (("max_batch_tokens", max_batch_tokens), ("multiple_of", multiple_of)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1.")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    while order:
        length = -(-len(rows[order[0]]) // multiple_of) * multiple_of
        n_rows = max(1, max_batch_tokens // max(1, length))
        yield padded_batch(rows, order[:n_rows], length=length, pad_id=pad_id)
        del order[:n_rows]


def padded_batch(
    rows: Sequence[Sequence[int]], positions: Sequence[int], *, pad_id: int, length: int | None = None
) -> TokenBatch:
    """One batch of the rows at ``positions``, padded to ``length``, or to the longest of them."""
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
    """Cut an iterable in lists of ``size``, lazily; the last may be shorter.

    Raises:
        InputError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError(f"The window or batch size is {size}; expected at least 1.")
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
