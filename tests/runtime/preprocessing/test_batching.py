"""Batches hold every row once, within the budget, padded no further than they must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.preprocessing.batching import batches_from_rows, runs_from_lengths, windows

ROWS = st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=20), max_size=40)


@given(ROWS, st.integers(1, 200), st.integers(1, 8))
def test_batches_restore_every_row(rows, budget, multiple_of):
    restored = [None] * len(rows)
    for batch in batches_from_rows(rows, pad_id=1, max_batch_tokens=budget, multiple_of=multiple_of):
        n_rows, length = batch.input_ids.shape
        assert n_rows == 1 or n_rows * length <= budget
        assert length % multiple_of == 0
        assert length - max(batch.attention_mask.sum(axis=1)) < multiple_of
        assert batch.n_tokens == batch.attention_mask.sum()
        assert batch.n_padding_tokens == batch.input_ids.size - batch.n_tokens
        assert (batch.input_ids[batch.attention_mask == 0] == 1).all()
        for position, ids, mask in zip(batch.positions, batch.input_ids, batch.attention_mask, strict=True):
            assert restored[position] is None
            restored[position] = ids[mask == 1].tolist()
    assert restored == rows


@given(st.lists(st.integers(1, 77), max_size=80), st.integers(1, 500), st.integers(1, 20), st.integers(1, 64))
def test_runs_hold_every_row_within_the_limits(lengths, max_tokens, max_rows, overhead):
    runs = runs_from_lengths(lengths, max_tokens=max_tokens, max_rows=max_rows, overhead=overhead)
    assert sorted(i for run in runs for i in run) == list(range(len(lengths)))
    for run in runs:
        longest = max(lengths[i] for i in run)
        assert len(run) <= max_rows
        assert len(run) == 1 or len(run) * longest <= max_tokens


def cost(lengths, runs, overhead):
    return sum(len(run) * max(lengths[i] for i in run) + overhead for run in runs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 12))
def test_no_other_split_between_lengths_costs_less(lengths, max_tokens, overhead):
    found = cost(lengths, runs_from_lengths(lengths, max_tokens=max_tokens, overhead=overhead), overhead)
    groups = [list(rows) for _, rows in itertools.groupby(sorted(lengths, reverse=True))]
    for cuts in itertools.product([False, True], repeat=len(groups) - 1):
        parts = [list(groups[0])]
        for cut, rows in zip(cuts, groups[1:], strict=True):
            parts = [*parts, rows] if cut else [*parts[:-1], parts[-1] + rows]
        fits = [max(1, max_tokens // part[0]) for part in parts]
        others = sum(len(p) * p[0] + overhead * -(-len(p) // fit) for p, fit in zip(parts, fits, strict=True))
        assert found <= others


def test_runs_split_where_padding_costs_more_than_a_run():
    def split(overhead):
        runs = runs_from_lengths([5, 60, 5, 60], max_tokens=10_000, max_rows=64, overhead=overhead)
        return [sorted(run.tolist()) for run in runs]

    assert split(100) == [[1, 3], [0, 2]]
    assert split(120) == [[0, 1, 2, 3]]


def test_sorting_leaves_little_padding():
    rows = [[7] * (1 + i % 16) for i in range(512)]
    batches = list(batches_from_rows(rows, pad_id=1, max_batch_tokens=512))
    n_tokens = sum(len(row) for row in rows)
    assert sum(batch.n_padding_tokens for batch in batches) < 0.15 * n_tokens


def test_the_longest_rows_come_first():
    batches = list(batches_from_rows([[1], [1] * 9, [1] * 4], pad_id=0, max_batch_tokens=9))
    assert [batch.input_ids.shape[1] for batch in batches] == sorted(
        (batch.input_ids.shape[1] for batch in batches), reverse=True
    )
    assert batches[0].input_ids.dtype == batches[0].attention_mask.dtype == np.int64


def test_a_row_over_the_budget_runs_alone():
    batches = list(batches_from_rows([[5] * 30, [5], [5]], pad_id=0, max_batch_tokens=4))
    assert [batch.input_ids.shape for batch in batches] == [(1, 30), (2, 1)]


@pytest.mark.parametrize("options", [{"max_batch_tokens": 0}, {"max_batch_tokens": 8, "multiple_of": 0}])
def test_numbers_below_one_are_errors(options):
    with pytest.raises(InputError, match="expected at least 1"):
        next(batches_from_rows([[1]], pad_id=0, **options))


def test_windows_are_lazy_and_bounded():
    cut = windows(itertools.count(), 3)
    assert [next(cut), next(cut)] == [[0, 1, 2], [3, 4, 5]]
    assert list(windows(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(windows([], 2)) == []


def test_an_empty_window_is_an_error():
    with pytest.raises(InputError, match="expected at least 1"):
        next(windows([1], 0))
