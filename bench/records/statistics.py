"""Intervals of medians and of their ratios, by bootstrap over processes and the samples in them.

Processes differ as a whole: their memory is placed differently, their kernels are chosen anew. So the samples
of one process are not independent of each other, and processes are resampled first. Few processes make the
plain bootstrap too narrow: its deviation is enlarged by √(k / (k − 1)) for k processes, and the normal
quantile is replaced by Student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError

__all__ = [
    "Interval",
    "bootstrap_median_interval",
    "bootstrap_ratio_interval",
    "chance_of_binomial",
    "chance_of_ratio",
    "discoveries",
]

Processes = Sequence[Sequence[float]]
"""Samples by process, as ``Record.by_process`` gives them; all of them positive."""

_N_RESAMPLES = 500
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
"""Two-sided 95% quantiles for 1, 2, … degrees of freedom."""
_NORMAL_95 = 1.96
_N_STEPS = 4_096


@dataclass(frozen=True, slots=True)
class Interval:
    """95% confidence interval."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Return True if the intervals share a value."""
        return self.low <= other.high and other.low <= self.high

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap_median_interval(samples: Processes, *, seed: int = 0) -> Interval:
    """Return the interval of the median over processes of each process's median.

    Args:
        samples: Samples by process. Those of a single process are taken as independent.

    Raises:
        BabeltowerError: there are no samples, or one is not positive.
    """
    centre, spread, freedom = _log_median(samples, np.random.default_rng(seed))
    reach = _quantile(freedom) * spread
    return Interval(math.exp(centre - reach), math.exp(centre + reach))


def bootstrap_ratio_interval(old: Processes, new: Processes, *, seed: int = 0) -> Interval:
    """Return the interval of new ÷ old, medians; it contains 1 if no difference is shown.

    Errors as of ``bootstrap_median_interval``; degrees of freedom are Welch's.
    """
    centre, spread, freedom = _log_ratio(old, new, np.random.default_rng(seed))
    reach = _quantile(freedom) * spread
    return Interval(math.exp(centre - reach), math.exp(centre + reach))


def chance_of_ratio(old: Processes, new: Processes, *, seed: int = 0) -> float:
    """Return the two-sided probability of a ratio of medians this far from 1 if nothing changed.

    Errors as of ``bootstrap_median_interval``. Samples without any spread give 1 if equal, else 0. A single
    sample shows nothing of its noise and gives 1.
    """
    if any(sum(map(len, samples)) < 2 for samples in (old, new)):
        return 1.0
    centre, spread, freedom = _log_ratio(old, new, np.random.default_rng(seed))
    if spread == 0:
        return 1.0 if centre == 0 else 0.0
    return _student_tails(abs(centre) / spread, freedom)


def chance_of_binomial(n_lost: int, n_gained: int) -> float:
    """Return the two-sided probability of so uneven a split if a coin decided each change."""
    n = n_lost + n_gained
    at_least = sum(math.comb(n, k) for k in range(max(n_lost, n_gained), n + 1))
    return min(1.0, 2 * at_least / (1 << n))


def discoveries(chances: Sequence[float], *, false_share: float = 0.05) -> list[bool]:
    """Return which findings are significant, with at most this share of them expected to be false.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    n_believed = max(
        (i + 1 for i, at in enumerate(order) if chances[at] <= false_share * (i + 1) / len(order)), default=0
    )
    believed = set(order[:n_believed])
    return [i in believed for i in range(len(chances))]


def _log_ratio(old: Processes, new: Processes, random: np.random.Generator) -> tuple[float, float, float]:
    """Return the logarithm of new ÷ old, its deviation, degrees of freedom."""
    (old_centre, old_spread, old_freedom), (new_centre, new_spread, new_freedom) = (
        _log_median(samples, random) for samples in (old, new)
    )
    variance = old_spread**2 + new_spread**2
    parts = old_spread**4 / old_freedom + new_spread**4 / new_freedom
    freedom = variance**2 / parts if parts > 0 else old_freedom + new_freedom
    return new_centre - old_centre, math.sqrt(variance), freedom


def _student_tails(t: float, freedom: float) -> float:
    """Return both tails of Student's distribution beyond ±t.

    With t = √ν·tan(θ), its density is cos(θ)^(ν - 1).
    """
    start = math.atan(t / math.sqrt(freedom))
    beyond, whole = (_integral_of_cosine_power(low, freedom - 1) for low in (start, 0.0))
    return min(1.0, beyond / whole)


def _integral_of_cosine_power(low: float, power: float) -> float:
    """Integrate from ``low`` to a right angle by the midpoint rule."""
    width = (math.pi / 2 - low) / _N_STEPS
    angles = low + width * (np.arange(_N_STEPS) + 0.5)
    return float((np.cos(angles) ** power).sum() * width)


def _log_median(samples: Processes, random: np.random.Generator) -> tuple[float, float, float]:
    """Return the log of the median of processes' medians, its bootstrapped deviation, and freedom."""
    groups = [np.asarray(group, dtype=np.float64) for group in samples]
    if not groups or any(len(group) == 0 or (group <= 0).any() for group in groups):
        raise BabeltowerError(
            "An interval needs positive samples of every process; got "
            f"{[[round(float(v), 4) for v in group[:3]] for group in groups]}."
        )
    centre = math.log(statistics.median(float(np.median(group)) for group in groups))
    if len(groups) == 1:
        n = len(groups[0])
        medians = np.log(np.median(_resampled(groups[0], random, (_N_RESAMPLES, n)), axis=1))
        return centre, float(medians.std()) * _enlarged(n), float(max(n - 1, 1))
    of_groups = np.stack(
        [np.median(_resampled(group, random, (_N_RESAMPLES, len(group))), axis=1) for group in groups]
    )
    chosen = random.integers(0, len(groups), (_N_RESAMPLES, len(groups)))
    medians = np.log(np.median(of_groups[chosen, np.arange(_N_RESAMPLES)[:, None]], axis=1))
    return centre, float(medians.std()) * _enlarged(len(groups)), float(len(groups) - 1)


def _resampled(
    group: NDArray[np.float64], random: np.random.Generator, shape: tuple[int, int]
) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = group[random.integers(0, len(group), shape)]
    return drawn


def _enlarged(n: int) -> float:
    return math.sqrt(n / (n - 1)) if n > 1 else 1.0


def _quantile(freedom: float) -> float:
    """Return Student's quantile, interpolated linearly in 1 ÷ degrees of freedom."""
    at = max(freedom, 1.0)
    below = math.floor(at)
    if below >= len(_STUDENT_95):
        last = len(_STUDENT_95)
        return _NORMAL_95 + (_STUDENT_95[-1] - _NORMAL_95) * last / at
    low = _STUDENT_95[below - 1]
    high = _STUDENT_95[below] if below < len(_STUDENT_95) else _NORMAL_95
    share = (1 / below - 1 / at) / (1 / below - 1 / (below + 1))
    return low + (high - low) * share
