"""One graph, opened in a process of its own that times runs on request.

The child (``python -m bench.timing.timed_process SPEC``) imports only the runtime and one engine. It writes
JSON lines: first the cost of opening and of the first answer, then one answer to each request.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bench.models.samples import ROOT
from runtime.cosines import require_directions
from runtime.errors import BabeltowerError, EngineError

__all__ = ["WORKER", "GraphSpec", "OpenedGraph", "Pace", "Rates", "TimedProcess", "Times", "timed_runs"]

WORKER = ("-m", "bench.timing.timed_process")
"""Arguments of Python; a test substitutes a program that is slower on purpose."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Graph, engine and settings of the child; ``device`` as in ``open_backend``."""

    graph: str
    engine: str
    precision: str
    threads: int
    output: str
    instances: int = 1
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """Duration of timing a shape in one turn: at least ``seconds`` and ``min_runs``, after a warm-up."""

    seconds: float
    min_runs: int
    warm_up: int = 1
    max_runs: int = 200


@dataclass(frozen=True, slots=True)
class OpenedGraph:
    """Milliseconds to open the graph (the engine's import included) and of the first run; MB after it."""

    load_ms: float
    first_ms: float
    resident_mb: float


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each run; ``device_ms`` is empty where the engine keeps no events."""

    wall_ms: list[float]
    cpu_ms: list[float]
    device_ms: list[float]


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of as many callers as the graph has instances, none of which ever waits for work."""

    rows_per_s: float
    rows_per_core_s: float


class _Runs(Protocol):
    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]: ...


@runtime_checkable
class _HasEvents(Protocol):
    def run_with_events(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> tuple[list[NDArray[Any]], float]: ...


def timed_runs(backend: _Runs, inputs: Mapping[str, NDArray[Any]], output: str, pace: Pace) -> Times:
    """Time runs one by one, each from arrays in memory to arrays in memory."""
    for _ in range(pace.warm_up):
        backend.run(inputs, [output])
    has_events = isinstance(backend, _HasEvents)
    wall: list[float] = []
    cpu: list[float] = []
    device: list[float] = []
    begun = time.perf_counter()
    while len(wall) < pace.max_runs and (
        len(wall) < pace.min_runs or time.perf_counter() - begun < pace.seconds
    ):
        cpu_before, before = time.process_time_ns(), time.perf_counter_ns()
        if has_events:
            device.append(backend.run_with_events(inputs, [output])[1])  # type: ignore[attr-defined]
        else:
            backend.run(inputs, [output])
        wall.append((time.perf_counter_ns() - before) / 1e6)
        cpu.append((time.process_time_ns() - cpu_before) / 1e6)
    return Times(wall, cpu, device)


class TimedProcess:
    """Parent's side of the child process.

    Raises:
        BabeltowerError: the child could not open the graph, or died; then the message says why.
    """

    def __init__(self, spec: GraphSpec, first: Path, *, worker: Sequence[str] = WORKER) -> None:
        self.spec = spec
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._child = subprocess.Popen(
            [sys.executable, *worker, json.dumps({**asdict(spec), "first": str(first)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.opened = OpenedGraph(**self._answer())

    def times(self, inputs: Path, pace: Pace) -> Times:
        """Time the runs of one shape."""
        return Times(**self._ask({"inputs": str(inputs), "pace": asdict(pace)}))

    def saturate(self, inputs: Path, seconds: float) -> Rates:
        """Measure rows per second while every instance is busy."""
        return Rates(**self._ask({"inputs": str(inputs), "saturate_s": seconds}))

    def vectors(self, inputs: Path) -> NDArray[Any]:
        """Return the graph's vectors of the inputs."""
        return np.asarray(self._ask({"inputs": str(inputs), "pace": None})["vectors"])

    def close(self) -> None:
        """End the child process."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line:
            code = self._child.wait()
            answer = {"error": f"the process died with exit code {code}; out of memory is likely."}
        if "error" in answer:
            self.close()
            spec = self.spec
            raise BabeltowerError(f"{spec.engine} {spec.precision}, {spec.graph}: {answer['error']}")
        return answer


def main(arguments: Sequence[str]) -> None:
    """Run the child; it answers on the original stdout, and the engines' own output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(arguments[0])
    first = Path(spec.pop("first"))
    try:
        for answer in _answers(GraphSpec(**spec), first):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except BabeltowerError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()


def _answers(spec: GraphSpec, first: Path) -> Iterator[dict[str, Any]]:
    from runtime.backends import open_backend
    from runtime.manifest import GPU_ENGINES, Engine, Precision

    inputs = {str(first): _arrays(first)}
    started = time.perf_counter()
    backend = open_backend(
        Engine(spec.engine),
        Path(spec.graph),
        precision=Precision(spec.precision),
        threads=None if Engine(spec.engine) in GPU_ENGINES else spec.threads,
        instances=spec.instances,
        device=spec.device,
    )
    opened = time.perf_counter()
    (vectors,) = backend.run(inputs[str(first)], [spec.output])
    answered = time.perf_counter()
    require_directions(vectors, what="vectors of the first answer")
    yield asdict(OpenedGraph((opened - started) * 1e3, (answered - opened) * 1e3, _resident_bytes() / 1e6))
    for line in sys.stdin:
        request = json.loads(line)
        path = request["inputs"]
        if path not in inputs:
            inputs[path] = _arrays(Path(path))
        if "saturate_s" in request:
            yield asdict(_saturated(backend, inputs[path], spec, request["saturate_s"]))
        elif request["pace"] is None:
            yield {"vectors": backend.run(inputs[path], [spec.output])[0].astype(float).tolist()}
        else:
            yield asdict(timed_runs(backend, inputs[path], spec.output, Pace(**request["pace"])))
    backend.close()


def _saturated(backend: _Runs, inputs: Mapping[str, NDArray[Any]], spec: GraphSpec, seconds: float) -> Rates:
    """Run every caller until the time is over; runs that are under way then are finished and count."""

    def caller(_: int) -> int:
        n = 0
        while time.perf_counter() - started < seconds:
            backend.run(inputs, [spec.output])
            n += 1
        return n

    with ThreadPoolExecutor(spec.instances) as pool:
        list(pool.map(lambda _: backend.run(inputs, [spec.output]), range(spec.instances)))
        started, cpu_started = time.perf_counter(), time.process_time()
        n_runs = sum(pool.map(caller, range(spec.instances)))
        spent, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    n_rows = n_runs * len(next(iter(inputs.values())))
    return Rates(n_rows / spent, n_rows / cpu)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        raise EngineError("Resident memory is read from /proc; this system has none. Measure on Linux.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
