"""Trend of memory over time: a robust line, with an interval that allows for correlated samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import BabeltowerError

__all__ = ["Trend", "trend_of_samples"]

_BLOCKS = 10
_RANK = 11
"""Number of the 45 slopes between ten blocks beyond each end of the 95% interval (Kendall)."""


@dataclass(frozen=True, slots=True)
class Trend:
    """Fitted line.

    Attributes:
        bytes_per_min: Slope.
        low, high: 95% interval of the slope, bytes per minute.
        mean_bytes: Mean of the fitted minima.
        minutes: Time from the first fitted sample to the last.
    """

    bytes_per_min: float
    low: float
    high: float
    mean_bytes: float
    minutes: float

    def is_flat(self, share: float) -> bool:
        """Return True if the growth, at the upper end of the interval, is within a share of the memory."""
        return self.high * self.minutes <= share * self.mean_bytes


def trend_of_samples(samples: Sequence[tuple[float, float]], *, skip: float) -> Trend:
    """Fit a line to samples of (seconds, bytes), skipping the first ``skip`` (a share) of the time.

    Temporary memory is not growth: requests of 34 MB, or a heap that is some MB larger for a minute or two
    until its last block is freed. So the line is fitted to the minimum of each of ten blocks of equal length,
    which permanent growth raises. Its slope is the median of the slopes between all pairs of blocks (Theil
    and Sen), with the interval of Kendall's rank test: a block that never returned to the level of the others
    does not bend it. Neighbouring samples are nearly equal, so an interval that takes every sample as
    independent would be far too narrow.

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
    n_bytes = np.array([block[:, 1].min() for block in blocks])
    earlier, later = np.triu_indices(_BLOCKS, k=1)
    slopes = np.sort((n_bytes[later] - n_bytes[earlier]) / (minutes[later] - minutes[earlier]))
    return Trend(
        bytes_per_min=float(np.median(slopes)),
        low=float(slopes[_RANK]),
        high=float(slopes[-1 - _RANK]),
        mean_bytes=float(n_bytes.mean()),
        minutes=float((kept[-1, 0] - kept[0, 0]) / 60),
    )
