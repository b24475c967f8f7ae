"""Bootstrap intervals: how wide, how often they hold the truth, and what they show."""

from __future__ import annotations

import numpy as np
import pytest

from bench.records.statistics import Interval, bootstrap_median_interval, bootstrap_ratio_interval
from runtime.errors import BabeltowerError


def run_of(random: np.random.Generator, n_processes: int, *, scale: float = 1.0) -> list[list[float]]:
    """Processes that differ by 2% from each other, and samples in them by 5%."""
    levels = scale * np.exp(0.02 * random.standard_normal(n_processes))
    return [list(level * np.exp(0.05 * random.standard_normal(20))) for level in levels]


@pytest.mark.parametrize("n_processes", [3, 5, 8])
def test_the_interval_holds_the_truth_as_often_as_it_says(n_processes: int) -> None:
    random = np.random.default_rng(0)
    held = [
        1.0 in bootstrap_ratio_interval(run_of(random, n_processes), run_of(random, n_processes))
        for _ in range(200)
    ]
    assert 0.92 <= np.mean(held) <= 1.0


def test_a_regression_is_shown() -> None:
    random = np.random.default_rng(1)
    shown = bootstrap_ratio_interval(run_of(random, 5), run_of(random, 5, scale=1.2))
    assert shown.low > 1.05
    assert 1.2 in shown


def test_what_processes_differ_by_is_not_lost_in_many_samples() -> None:
    few, many = [[1.0] * 5, [1.1] * 5, [1.2] * 5], [[1.0] * 500, [1.1] * 500, [1.2] * 500]
    narrow, wide = bootstrap_median_interval(many), bootstrap_median_interval(few)
    assert narrow.low == pytest.approx(wide.low, rel=0.05)
    assert narrow.high == pytest.approx(wide.high, rel=0.05)
    assert narrow.high > 1.2


def test_one_process_alone_is_resampled_by_its_samples() -> None:
    interval = bootstrap_median_interval([list(np.linspace(9, 11, 101))])
    assert 9.5 < interval.low < 10 < interval.high < 10.5
    alike = bootstrap_median_interval([[2.0, 2.0, 2.0]])
    assert (alike.low, alike.high) == pytest.approx((2.0, 2.0))


def test_intervals_overlap_where_they_share_a_value() -> None:
    assert Interval(1, 2).overlaps(Interval(2, 3))
    assert not Interval(1, 2).overlaps(Interval(2.1, 3))


@pytest.mark.parametrize("samples", [[], [[]], [[1.0], []], [[1.0, 0.0]]])
def test_samples_that_have_no_interval_are_refused(samples: list) -> None:
    with pytest.raises(BabeltowerError, match="positive samples"):
        bootstrap_median_interval(samples)
