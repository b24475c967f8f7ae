"""Which texts of a batch go through the tower together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["bucket_label", "buckets_from_lengths"]


def buckets_from_lengths(
    lengths: Sequence[int], *, token_budget: int, max_rows: int, overhead: int
) -> list[list[int]]:
    """Split rows by length so that padding and calls together cost least.

    Every bucket is padded to its longest row. The split minimises the padded tokens of all buckets plus
    ``overhead`` a bucket, over all splits of the sorted rows (dynamic programming, rows² / 2 steps).

    Args:
        lengths: Tokens of each row.
        token_budget: Rows × longest row of a bucket; a row that is longer goes alone.
        max_rows: Rows of a bucket.
        overhead: Cost of a bucket, in tokens.

    Returns:
        Positions of the rows, each in one bucket; longest bucket first, so that the first needs most memory.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    longest = np.asarray([max(1, lengths[i]) for i in order], dtype=np.int64)
    n_rows = len(order)
    cost = np.zeros(n_rows + 1, dtype=np.int64)
    first = [0] * (n_rows + 1)
    for end in range(1, n_rows + 1):
        starts = np.arange(max(0, end - max_rows), end)
        tokens = (end - starts) * longest[starts]
        fits = (tokens <= token_budget) | (starts == end - 1)
        starts, tokens = starts[fits], tokens[fits]
        total = cost[starts] + tokens + overhead
        best = int(total.argmin())
        cost[end], first[end] = total[best], int(starts[best])
    buckets = []
    end = n_rows
    while end:
        buckets.append(order[first[end] : end])
        end = first[end]
    return buckets[::-1]


def bucket_label(length: int) -> str:
    """The range of lengths that a bucket is counted under: ``1-8``, ``9-16``, ``17-32``, …"""
    upper = 8
    while upper < length:
        upper *= 2
    return f"{1 if upper == 8 else upper // 2 + 1}-{upper}"
