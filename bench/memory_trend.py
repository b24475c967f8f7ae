"""Does memory grow? A line through its samples, with an interval that correlation does not fool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import BabeltowerError

__all__ = ["Trend", "trend_of_samples"]

_BLOCKS = 10
_T_975 = 2.306
"""Student's t, two-sided 95%, 8 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A fitted line.

    Attributes:
        bytes_per_min: Its slope.
        low, high: The 95% interval of the slope, bytes a minute.
        mean_bytes: Mean of the fitted medians.
        minutes: From the first fitted sample to the last.
    """

    bytes_per_min: float
    low: float
    high: float
    mean_bytes: float
    minutes: float

    def is_flat(self, share: float) -> bool:
        """Whether what the memory may have grown by, at most, is under a share of it over the fitted time."""
        return self.high * self.minutes <= share * self.mean_bytes


def trend_of_samples(samples: Sequence[tuple[float, float]], *, skip: float) -> Trend:
    """Fit a line to samples of (seconds, bytes), without the first ``skip`` (a share) of the time.

    Neighbouring samples are nearly equal, so an interval from each for itself would be far too narrow: the
    line goes through the medians of ten blocks of equal length. A median does not see the moment in which a
    request of 34 MB is in memory; what stays in memory raises it.

    Raises:
        BabeltowerError: too few samples are left.
    """
    data = np.asarray(samples, dtype=np.float64).reshape(-1, 2)
    kept = data[data[:, 0] >= data[:, 0].max(initial=0.0) * skip]
    if len(kept) < 2 * _BLOCKS:
        raise BabeltowerError(
            f"{len(kept)} samples are left of {len(data)}; a trend needs {2 * _BLOCKS}. Measure for longer."
        )
    blocks = np.array_split(kept, _BLOCKS)
    minutes = np.array([block[:, 0].mean() / 60 for block in blocks])
    n_bytes = np.array([np.median(block[:, 1]) for block in blocks])
    (slope, offset) = np.polyfit(minutes, n_bytes, 1)
    left = n_bytes - (slope * minutes + offset)
    spread = np.sqrt((left**2).sum() / (_BLOCKS - 2) / ((minutes - minutes.mean()) ** 2).sum())
    half = _T_975 * spread
    return Trend(
        bytes_per_min=float(slope),
        low=float(slope - half),
        high=float(slope + half),
        mean_bytes=float(n_bytes.mean()),
        minutes=float((kept[-1, 0] - kept[0, 0]) / 60),
    )
