"""Two operations side by side: servers of both are up, and load goes to one and the other in turn."""

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
    """A candidate against the default, round by round.

    Attributes:
        rates: Answers a second of (default, candidate), a pair a round.
        p99_ms: Of all rounds' requests, default and candidate.
        failures: Requests that were not answered, default and candidate.
    """

    candidate: ServingSettings
    rates: tuple[tuple[float, float], ...]
    p99_ms: tuple[float, float]
    failures: tuple[int, int]

    @property
    def ratios(self) -> list[float]:
        """Candidate ÷ default, a round each."""
        return [candidate / default for default, candidate in self.rates]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return sorted(self.ratios)[(len(self.rates) - 1) // 2]

    @property
    def interval(self) -> tuple[float, float]:
        """Of the ratios' median, of at least 95% from 6 rounds on."""
        return median_interval(self.ratios)

    def is_better(self, limit_ms: float | None) -> bool:
        """Whether the candidate keeps the limit and beats the default beyond doubt, or alone keeps it.

        ``limit_ms`` is the default's own 99th percentile of these very rounds where it is ``None``.
        """
        limit = self.p99_ms[0] if limit_ms is None else limit_ms
        if self.failures[1] or self.p99_ms[1] > limit:
            return False
        return self.p99_ms[0] > limit or self.interval[0] > 1


def paired_loads(
    load: Callable[[T, float], Load], default: T, candidate: T, *, rounds: int, seconds: float
) -> list[tuple[Load, Load]]:
    """Loads of (default, candidate), in turn; who is first changes from round to round."""
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
    """What the rounds say."""
    p99 = [float(np.percentile(np.concatenate([pair[i].latencies_ms for pair in pairs]), 99)) for i in (0, 1)]
    failures = [sum(sum(pair[i].failures.values()) for pair in pairs) for i in (0, 1)]
    rates = tuple((default.rate, tuned.rate) for default, tuned in pairs)
    return Confirmation(candidate, rates, (p99[0], p99[1]), (failures[0], failures[1]))


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two samples that hold the median between them with a probability of 95% or more.

    From the binomial distribution; smallest and largest of fewer than 6 samples, which hold it less surely.
    """
    ordered, n = sorted(samples), len(samples)
    cut, tail = 0, 0.0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        cut = k
    return ordered[cut], ordered[n - 1 - cut]
