"""Time a run three ways: the device's own time, a call on device memory, and from NumPy to NumPy.

- ``device``: between two events on the stream. The queue is filled before the first one is reached, so that
  the time it takes to launch kernels is not part of it.
- ``call``: until the result is complete, inputs and outputs in device memory; what launching costs is in it.
- ``wall``: from arrays in host memory to an array in host memory.

Without a GPU, all three are wall time of the processor: a dry run of the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["METRICS", "Clock", "Contender"]

Run = Callable[[], Any]

METRICS = ("device", "call", "wall")


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a tower, ready for one shape.

    Attributes:
        by: Name in tables.
        engine: Engine that computes.
        precision: Precision of the products.
        launch: Start a run on inputs in device memory, without waiting for it.
        from_host: Compute from arrays in host memory to an array in host memory.
        detail: Facts for the record.
        metrics: Kinds of samples to take.
    """

    by: str
    engine: str
    precision: str
    launch: Run
    from_host: Run
    detail: dict[str, Any]
    metrics: tuple[str, ...] = METRICS


@dataclass(frozen=True, slots=True)
class Clock:
    """Times runs on one CUDA stream, or on the processor if there is none.

    Attributes:
        stream: Stream that the runs use.
        seconds: Time for one contender's samples of one kind.
        n_most: Maximum number of samples.
        n_least: Minimum number of samples.
    """

    stream: Any = None
    seconds: float = 0.05
    n_most: int = 30
    n_least: int = 2

    def samples(self, contender: Contender) -> dict[str, list[float]]:
        """Return milliseconds per run, by metric."""
        for _ in range(2):
            contender.launch()
        self.wait()
        launch_ms = self._launch(contender.launch)
        kinds: dict[str, Callable[[], float]] = {
            "device": lambda: self._on_device(contender.launch, launch_ms),
            "call": lambda: self._one(contender.launch),
            "wall": lambda: self._one(contender.from_host),
        }
        return {name: self._repeat(kinds[name]) for name in contender.metrics}

    def wait(self) -> None:
        """Wait until the stream has done all its work."""
        if self.stream is not None:
            self.stream.synchronize()

    def _repeat(self, once: Callable[[], float]) -> list[float]:
        found: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(found) < self.n_least or (len(found) < self.n_most and time.perf_counter() < end):
            found.append(once())
        return found

    def _one(self, run: Run) -> float:
        started = time.perf_counter_ns()
        run()
        self.wait()
        return (time.perf_counter_ns() - started) / 1e6

    def _launch(self, run: Run) -> float:
        """Return the milliseconds until a run is queued, and wait for it."""
        started = time.perf_counter_ns()
        run()
        launched = time.perf_counter_ns()
        self.wait()
        return (launched - started) / 1e6

    def _on_device(self, run: Run, launch_ms: float) -> float:
        if self.stream is None:
            return self._one(run)
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        sleep: Any = torch.cuda._sleep
        sleep(int(2e6 * (launch_ms + 0.1)))  # cycles at about 2 GHz: longer than the launch takes
        begin.record(self.stream)
        run()
        end.record(self.stream)
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed
