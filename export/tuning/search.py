"""Coordinate descent over serving settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from export.tuning.operation import ServingSettings
from runtime.manifest import Modality

__all__ = ["Axis", "TrialLog", "TuningTrial", "axes_for", "best_first", "searched"]

_GAIN = 1.01
"""Minimum improvement of the rate to accept a step; less is noise."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Search axis: settings that change together, ordered so that neighbours are similar."""

    name: str
    steps: tuple[Mapping[str, int], ...]

    def around(
        self, operation: ServingSettings
    ) -> tuple[tuple[ServingSettings, ...], tuple[ServingSettings, ...]]:
        """Return the configurations above and below the given one on this axis, the nearest first."""
        own = {key: getattr(operation, key) for key in self.steps[0]}
        order = [dict(step) for step in self.steps]
        if own not in order:
            order = sorted([*order, own], key=lambda step: tuple(step.values()))
        at = order.index(own)
        above = tuple(dataclasses.replace(operation, **step) for step in order[at + 1 :])
        below = tuple(dataclasses.replace(operation, **step) for step in reversed(order[:at]))
        return above, below


def _ladder(name: str, *values: int) -> Axis:
    return Axis(name, tuple({name: value} for value in values))


def axes_for(modality: Modality, n_cores: int) -> tuple[Axis, ...]:
    """Return the search axes, the most influential first: instances × threads, then the front end."""
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= n_cores]
    shapes = [(n, n_cores // n if n > 1 else 0) for n in counts]  # 0 threads: the engine uses all cores
    tower = Axis("tower", tuple({"tower_instances": i, "tower_threads": t} for i, t in shapes))
    fronts = _ladder("front_instances", 1, 2, 3, 4)
    delay = _ladder("max_queue_delay_us", 0, 500, 2_000, 5_000)
    if modality is Modality.IMAGE:
        decoders = _ladder("decode_threads", *(n for n in (1, 2, 4, 8) if n <= 2 * n_cores))
        return tower, fronts, _ladder("max_batch_size", 4, 8, 16, 32, 64), decoders, delay
    return (
        tower,
        _ladder("bucket_overhead", 2, 4, 8, 16, 32, 64, 128, 256),
        fronts,
        _ladder("token_budget", 64, 128, 256, 512, 1_024, 2_048, 4_096),
        _ladder("max_batch_size", 8, 16, 32, 64, 128, 256),
        delay,
    )


@dataclass(frozen=True, slots=True)
class TuningTrial:
    """Measurement of a configuration under load; ``failures`` counts failed requests."""

    operation: ServingSettings
    rate: float
    p50_ms: float
    p99_ms: float
    failures: int = 0

    def holds(self, limit_ms: float) -> bool:
        """Return True if no request failed and p99 latency is within the limit."""
        return not self.failures and self.p99_ms <= limit_ms


def best_first(trials: Sequence[TuningTrial], limit_ms: float) -> list[TuningTrial]:
    """Sort trials: those within the limit by descending rate, then the others by failures and p99."""
    return sorted(
        trials,
        key=lambda t: (0, -t.rate) if t.holds(limit_ms) else (1, float(t.failures), t.p99_ms),
    )


@dataclass(slots=True)
class TrialLog:
    """Log of trials that measures each configuration once.

    Attributes:
        measure: Function that runs a server with a configuration under load.
        may_go_on: Function that returns True if there is time for another trial.
        trials: Trials in order of measurement.
    """

    measure: Callable[[ServingSettings], TuningTrial]
    may_go_on: Callable[[], bool]
    trials: dict[ServingSettings, TuningTrial] = field(default_factory=dict)

    def trial(self, operation: ServingSettings) -> TuningTrial | None:
        """Return the configuration's trial, measuring it if new; None if there is no time left."""
        if operation not in self.trials:
            if not self.may_go_on():
                return None
            self.trials[operation] = self.measure(operation)
        return self.trials[operation]


def searched(start: ServingSettings, axes: Sequence[Axis], log: TrialLog, *, limit_ms: float) -> TuningTrial:
    """Run a coordinate descent and return the best trial; all trials are in ``log``.

    Along each axis, steps are taken upwards while they improve the result, or else downwards. The search ends
    after a round over the axes without improvement, or when time is up.
    """
    first = log.trial(start)
    if first is None:
        raise ValueError("There is no time for even one trial; allow more minutes.")
    best, settled = first, False
    while not settled:
        settled = True
        for axis in axes:
            found = _along(axis, best, log, limit_ms)
            settled &= found is best
            best = found
    return best


def _along(axis: Axis, best: TuningTrial, log: TrialLog, limit_ms: float) -> TuningTrial:
    for direction in axis.around(best.operation):
        found = _climbed(direction, best, log, limit_ms)
        if found is not best:
            return found
    return best


def _climbed(
    steps: Sequence[ServingSettings], best: TuningTrial, log: TrialLog, limit_ms: float
) -> TuningTrial:
    for trial in _trials(steps, log):
        if not _is_better(trial, best, limit_ms):
            break
        best = trial
    return best


def _trials(steps: Sequence[ServingSettings], log: TrialLog) -> Iterator[TuningTrial]:
    for operation in steps:
        trial = log.trial(operation)
        if trial is None:
            return
        yield trial


def _is_better(trial: TuningTrial, best: TuningTrial, limit_ms: float) -> bool:
    if trial.holds(limit_ms) and best.holds(limit_ms):
        return trial.rate > _GAIN * best.rate
    return best_first([best, trial], limit_ms)[0] is trial
