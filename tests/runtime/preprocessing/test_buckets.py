"""Shapes on a GPU: few, full, and every row exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.preprocessing.buckets import EXACT_ROWS, Buckets, image_buckets, text_buckets

LENGTHS = st.lists(st.integers(1, 77), max_size=700)


@given(LENGTHS, st.sampled_from([None, EXACT_ROWS, 4]))
def test_every_row_runs_once_in_a_shape_that_holds_it(lengths: list[int], exact_rows: int | None) -> None:
    buckets = text_buckets(77, exact_rows=exact_rows)
    runs = buckets.runs(lengths)
    assert sorted(int(i) for run in runs for i in run.positions) == list(range(len(lengths)))
    for run in runs:
        assert len(run.positions) <= run.rows
        assert max(lengths[i] for i in run.positions) <= run.length
        assert (run.rows, run.length) in buckets.shapes or buckets.is_exact(run.rows, run.length)


@given(LENGTHS)
def test_a_batch_fits_the_shape_that_is_found_for_it(lengths: list[int]) -> None:
    buckets = text_buckets(77)
    for run in buckets.runs(lengths):
        longest = max(lengths[i] for i in run.positions)
        assert buckets.shape_of(len(run.positions), longest) == (run.rows, run.length)


def test_the_shapes_of_a_text_tower() -> None:
    buckets = text_buckets(77)
    assert buckets.lengths == (8, 16, 24, 32, 48, 64, 77)
    assert buckets.rows == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert all(rows * length <= 16_384 for rows, length in buckets.shapes)
    assert text_buckets(40).lengths == (8, 16, 24, 32, 40)
    assert text_buckets(8, max_rows=3).shapes == ((1, 8), (2, 8), (3, 8))


def test_room_in_a_run_takes_shorter_rows() -> None:
    (run,) = text_buckets(77).runs([30, 30, 30, 5])
    assert (run.rows, run.length, run.positions.tolist()) == (4, 32, [0, 1, 2, 3])


def test_full_runs_of_one_length_are_not_padded() -> None:
    runs = text_buckets(77, exact_rows=EXACT_ROWS).runs([13] * 1_030 + [5] * 2)
    assert [(run.rows, run.length) for run in runs] == [(512, 13), (512, 13), (8, 16)]
    assert sum(len(run.positions) for run in runs) == 1_032


def test_a_corpus_pads_a_few_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).gamma(5, 3.1, 32_768).astype(int) + 2, 3, 77)
    for exact_rows, most in ((None, 0.2), (EXACT_ROWS, 0.08)):
        runs = text_buckets(77, exact_rows=exact_rows).runs(lengths)
        padded = sum(run.rows * run.length for run in runs)
        assert 1 - lengths.sum() / padded <= most


def test_packed_rows_run_unpadded_whatever_their_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 78, 1_700)
    buckets = text_buckets(77, exact_rows=EXACT_ROWS, packed=True)
    runs = buckets.runs(lengths)
    assert sorted(np.concatenate([run.positions for run in runs]).tolist()) == list(range(1_700))
    for run in runs:
        assert len(run.positions) == run.rows <= 512
        assert run.length == lengths[run.positions].max()
        assert run.rows * run.length <= 16_384
        assert buckets.is_exact(run.rows, run.length)
        assert run is runs[-1] or run.rows == buckets.most_rows(run.length), "runs are full"
    assert buckets.runs([]) == []
    assert [run.rows for run in text_buckets(77, max_tokens=8, packed=True).runs([30, 20, 2, 1])] == [1, 1, 2]


@pytest.mark.parametrize("length", [1, 8, 9, 24, 32, 33, 40, 48, 63, 64, 65, 77])
def test_a_full_run_of_one_length_is_one_run(length: int) -> None:
    """As it is dealt out, so it is run: a backend that cut it would pad both parts."""
    buckets = text_buckets(77, exact_rows=EXACT_ROWS)
    (run, *_) = buckets.runs([length] * 600)
    assert run.rows <= buckets.most_rows(length)
    assert buckets.most_rows(length) >= buckets.rows_at(buckets.length_of(length))[-1]


def test_images_come_in_powers_of_two() -> None:
    runs = image_buckets().runs([1] * 700)
    assert [run.rows for run in runs] == [512, 128, 32, 16, 8, 4]


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (lambda: text_buckets(77).runs([5, 78]), "A row of 78 tokens is longer than the tower's 77"),
        (lambda: text_buckets(77).shape_of(300, 70), "300 rows of 70 tokens is larger than the largest"),
        (lambda: text_buckets(77, max_rows=0), "max_rows is 0; expected at least 1"),
        (lambda: Buckets((8, 8), (1,), 8, 0), "lengths are .* expected ascending numbers"),
    ],
)
def test_what_fits_no_shape_is_an_error(what: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        what()  # type: ignore[operator]
