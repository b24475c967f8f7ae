"""Intervals of medians and of their ratios, by bootstrap over processes and the samples in them.

A process is slower or faster than the next one as a whole: memory lies elsewhere, kernels are chosen anew.
So the samples of one process are not independent of each other, and what is resampled first is processes.
Few processes make the plain bootstrap too narrow: its deviation is enlarged by √(k / (k − 1)) for k
processes, and the normal quantile is replaced by Student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError

__all__ = ["Interval", "bootstrap_median_interval", "bootstrap_ratio_interval"]

Processes = Sequence[Sequence[float]]
"""Samples by process, as ``Record.by_process`` gives them; all of them positive."""

_N_RESAMPLES = 500
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
"""Two-sided 95% quantiles for 1, 2, … degrees of freedom."""
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """Of 95% confidence."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap_median_interval(samples: Processes, *, seed: int = 0) -> Interval:
    """The interval of the median over processes of each process's median.

    Args:
        samples: By process. With one process alone, its samples are taken for independent.

    Raises:
        BabeltowerError: no samples, or one that is not positive.
    """
    centre, spread, freedom = _log_median(samples, np.random.default_rng(seed))
    reach = _quantile(freedom) * spread
    return Interval(math.exp(centre - reach), math.exp(centre + reach))


def bootstrap_ratio_interval(old: Processes, new: Processes, *, seed: int = 0) -> Interval:
    """The interval of new ÷ old, medians; it holds 1 where no difference is shown.

    Errors as of ``bootstrap_median_interval``; degrees of freedom are Welch's.
    """
    random = np.random.default_rng(seed)
    (old_centre, old_spread, old_freedom), (new_centre, new_spread, new_freedom) = (
        _log_median(samples, random) for samples in (old, new)
    )
    variance = old_spread**2 + new_spread**2
    parts = old_spread**4 / old_freedom + new_spread**4 / new_freedom
    freedom = variance**2 / parts if parts > 0 else old_freedom + new_freedom
    reach = _quantile(freedom) * math.sqrt(variance)
    centre = new_centre - old_centre
    return Interval(math.exp(centre - reach), math.exp(centre + reach))


def _log_median(samples: Processes, random: np.random.Generator) -> tuple[float, float, float]:
    """Logarithm of the median of the processes' medians, its bootstrapped deviation, degrees of freedom."""
    groups = [np.asarray(group, dtype=np.float64) for group in samples]
    if not groups or any(len(group) == 0 or (group <= 0).any() for group in groups):
        raise BabeltowerError(
            "An interval wants positive samples of every process; got "
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
    """Student's, between the tabulated ones linearly in 1 ÷ degrees of freedom."""
    at = max(freedom, 1.0)
    below = math.floor(at)
    if below >= len(_STUDENT_95):
        last = len(_STUDENT_95)
        return _NORMAL_95 + (_STUDENT_95[-1] - _NORMAL_95) * last / at
    low = _STUDENT_95[below - 1]
    high = _STUDENT_95[below] if below < len(_STUDENT_95) else _NORMAL_95
    share = (1 / below - 1 / at) / (1 / below - 1 / (below + 1))
    return low + (high - low) * share
