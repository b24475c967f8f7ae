"""Paired comparison of two serving configurations, with both servers running and loaded alternately."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from export.tuning.load_generator import Load
from export.tuning.operation import ServingSettings

__all__ = ["Confirmation", "confirmation_of_loads", "median_interval", "paired_loads"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Comparison of a candidate with the default over several rounds.

    Attributes:
        rates: Responses per second of (default, candidate), one pair per round.
        p99_ms: 99th percentile latency over all rounds, default and candidate.
        failures: Number of failed requests, default and candidate.
    """

    candidate: ServingSettings
    rates: tuple[tuple[float, float], ...]
    p99_ms: tuple[float, float]
    failures: tuple[int, int]

    @property
    def ratios(self) -> list[float]:
        """Candidate's rate ÷ default's, per round."""
        return [candidate / default for default, candidate in self.rates]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return sorted(self.ratios)[(len(self.rates) - 1) // 2]

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of the ratios' median, of at least 95% for 6 rounds or more."""
        return median_interval(self.ratios)

    def is_better(self, limit_ms: float | None) -> bool:
        """Return True if the candidate meets the limit, and the default does not or is significantly slower.

        If ``limit_ms`` is None, the limit is the default's 99th percentile in these rounds.
        """
        limit = self.p99_ms[0] if limit_ms is None else limit_ms
        if self.failures[1] or self.p99_ms[1] > limit:
            return False
        return self.p99_ms[0] > limit or self.interval[0] > 1


def paired_loads(
    load: Callable[[T, float], Load], default: T, candidate: T, *, rounds: int, seconds: float
) -> list[tuple[Load, Load]]:
    """Measure (default, candidate) alternately; the order is swapped in every other round."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = load(candidate, seconds)
            pairs.append((load(default, seconds), second))
        else:
            first = load(default, seconds)
            pairs.append((first, load(candidate, seconds)))
    return pairs


def confirmation_of_loads(candidate: ServingSettings, pairs: Sequence[tuple[Load, Load]]) -> Confirmation:
    """Summarise the rounds of a comparison."""
    p99 = [float(np.percentile(np.concatenate([pair[i].latencies_ms for pair in pairs]), 99)) for i in (0, 1)]
    failures = [sum(sum(pair[i].failures.values()) for pair in pairs) for i in (0, 1)]
    rates = tuple((default.rate, tuned.rate) for default, tuned in pairs)
    return Confirmation(candidate, rates, (p99[0], p99[1]), (failures[0], failures[1]))


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return a distribution-free confidence interval of the median, of at least 95% for 6 samples or more.

    The bounds are order statistics, from the binomial distribution; with fewer than 6 samples they are the
    minimum and maximum, with a lower confidence.
    """
    ordered, n = sorted(samples), len(samples)
    cut, tail = 0, 0.0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        cut = k
    return ordered[cut], ordered[n - 1 - cut]
