"""Soak-test a server with thousands of requests, some invalid: correct answers and flat memory.

    python -m bench.serving.server_soak REPOSITORY/NAME --requests 10000 --minutes 12 --json FILE --plot FILE

Texts and images are sent at an even rate. Every twentieth request is invalid in one of fifteen ways and must
be answered INVALID_ARGUMENT, all others with the vector of the in-process runtime. Memory counts as flat if a
line through its samples, without the first quarter of the time, grows by at most 1% over the remaining time;
the limit applies to the upper end of the slope's 95% interval. Memory is what the processes hold beside the
files that they map.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import typer

from bench.records.environment import environment
from bench.records.memory_trend import Trend, trend_of_samples
from bench.timing.soak_requests import BAD_EVERY, Request, requests_of_soak
from runtime.manifest import Manifest
from runtime.server import ServerOptions, default_folder, environment_from_folder, running_server

__all__ = ["SoakResult", "own_bytes"]

_KIND = "babeltower-soak/3"
_WARM_UP = 0.25
_FLAT = 0.01
_EVERY_S = 2.0
_TOLERANCE = 1e-6
_ARGUMENTS = ("--grpc-infer-allocation-pool-size=0",)
"""Triton keeps the buffers of up to eight requests for reuse; at 34 MB each, they would hide a leak."""


@dataclass(slots=True)
class SoakResult:
    """Results of a soak test.

    Attributes:
        bad_kinds: Number of invalid requests that were refused correctly, by kind.
        messages: Error messages sent to the client, by kind.
        surprises: Unexpected answers.
        memory: Seconds since the start, and each process's own bytes (anonymous and shared memory), by name.
    """

    n_requests: int = 0
    n_good: int = 0
    n_good_right: int = 0
    n_bad: int = 0
    n_bad_refused: int = 0
    max_error: float = 0.0
    seconds: float = 0.0
    bad_kinds: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    surprises: list[str] = field(default_factory=list)
    processes_at_start: list[int] = field(default_factory=list)
    processes_at_end: list[int] = field(default_factory=list)
    memory: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    @property
    def restarted(self) -> bool:
        """True if a process ended or started during the test."""
        return self.processes_at_start != self.processes_at_end

    def trends(self) -> dict[str, Trend]:
        """Return the trends of every process, and of all together."""
        names = sorted(self.memory[-1][1])
        series = {name: [(at, n.get(name, 0)) for at, n in self.memory] for name in names}
        series["all"] = [(at, sum(n.values())) for at, n in self.memory]
        return {name: trend_of_samples(samples, skip=_WARM_UP) for name, samples in series.items()}

    def faults(self) -> list[str]:
        """Return all violated expectations."""
        found = []
        if self.n_good_right != self.n_good:
            found.append(
                f"{self.n_good - self.n_good_right} of {self.n_good} good requests not answered correctly"
            )
        if self.n_bad_refused != self.n_bad:
            found.append(
                f"{self.n_bad - self.n_bad_refused} of {self.n_bad} bad requests not refused as such"
            )
        if self.n_good + self.n_bad != self.n_requests:
            found.append(f"{self.n_requests - self.n_good - self.n_bad} requests without an answer")
        if self.restarted:
            found.append(f"processes {self.processes_at_start} became {self.processes_at_end}")
        trend = self.trends()["all"]
        if not trend.is_flat(_FLAT):
            found.append(
                f"memory grows by up to {trend.high / 1e6:.2f} MB a minute ({trend.mean_bytes / 1e6:.0f} MB)"
            )
        return found + self.surprises[:5]


def _processes(leader: int) -> list[int]:
    """Return the server and its Python models, by their process group."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2]) == leader
            ):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _name_of_process(pid: int, known: Mapping[int, str]) -> str:
    """Return ``server``, or the model whose Python process it is, numbered if there are several."""
    if pid in known:
        return known[pid]
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if "triton_python_backend_stub" not in words[0]:
        return "server"
    instance = next((word for word in words if "_" in word and word.rpartition("_")[2].isdigit()), str(pid))
    model = Path(words[1]).parent.parent.name
    taken = sum(name.rpartition(" ")[0] == model for name in known.values())
    return f"{model} {taken}" if instance else model


def own_bytes(rollup: str) -> int:
    """Return anonymous and shared memory, in equal parts per sharing process, from ``smaps_rollup``.

    Pages of mapped files are left out: they cannot leak, and a library's share changes with every other
    program that maps it.
    """
    return sum(
        int(line.split()[1]) * 1024
        for line in rollup.splitlines()
        if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    )


async def _watch(result: SoakResult, leader: int, started: float) -> None:
    names: dict[int, str] = {}
    while True:
        now = {}
        for pid in _processes(leader):
            try:
                names[pid] = _name_of_process(pid, names)
                now[names[pid]] = own_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
            except OSError:
                continue  # it ended in between; the final list of processes shows that
        result.memory.append((time.perf_counter() - started, now))
        await asyncio.sleep(_EVERY_S)


async def _soak(address: str, requests: Sequence[Request], pid: int, minutes: float) -> SoakResult:
    from tritonclient.grpc.aio import InferenceServerClient

    result = SoakResult(n_requests=len(requests), processes_at_start=_processes(pid))
    started = time.perf_counter()
    async with InferenceServerClient(address) as client:
        watching = asyncio.create_task(_watch(result, pid, started))
        pending = set()
        for i, request in enumerate(requests):
            due = started + i * minutes * 60 / len(requests)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            pending.add(task := asyncio.create_task(_send(client, request, result)))
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        watching.cancel()
    result.seconds = time.perf_counter() - started
    result.processes_at_end = _processes(pid)
    return result


async def _send(client: Any, request: Request, result: SoakResult) -> None:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import InferenceServerException

    tensors = []
    for name, array in request.inputs.items():
        tensor = InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "BYTES")
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    try:
        vector = (await client.infer(request.model, tensors)).as_numpy("vector")[0]
    except InferenceServerException as error:
        _refused(result, request, str(error.status()), str(error.message()))
    else:
        _answered(result, request, vector)


def _answered(result: SoakResult, request: Request, vector: Any) -> None:
    if request.expected is None:
        result.n_bad += 1
        result.surprises.append(f"{request.kind} was answered with a vector")
        return
    result.n_good += 1
    error = float(np.abs(vector - request.expected).max())
    result.max_error = max(result.max_error, error)
    result.n_good_right += error <= _TOLERANCE


def _refused(result: SoakResult, request: Request, status: str, message: str) -> None:
    if request.expected is not None:
        result.n_good += 1
        result.surprises.append(f"{request.kind} failed: {status} {message}")
        return
    result.n_bad += 1
    result.messages[request.kind] = message
    if status == "StatusCode.INVALID_ARGUMENT" and message:
        result.bad_kinds[request.kind] = result.bad_kinds.get(request.kind, 0) + 1
        result.n_bad_refused += 1
    else:
        result.surprises.append(f"{request.kind}: {status} {message}")


def _plot(result: SoakResult, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trend = result.trends()["all"]
    minutes = np.array([at for at, _ in result.memory]) / 60
    names = sorted(result.memory[-1][1], key=lambda name: -result.memory[-1][1][name])
    parts = [[n.get(name, 0) / 1e6 for _, n in result.memory] for name in names]
    figure, axes = plt.subplots(figsize=(8, 4.2))
    axes.stackplot(minutes, parts, labels=names, alpha=0.85)
    start = minutes[-1] - trend.minutes
    axes.axvline(start, color="grey", linewidth=0.8, linestyle=":")
    middle = (start + minutes[-1]) / 2
    ends = np.array([start, minutes[-1]])
    axes.plot(
        ends, (trend.mean_bytes + trend.bytes_per_min * (ends - middle)) / 1e6, color="black", linewidth=1.2
    )
    axes.set(
        xlabel="minutes",
        ylabel="MB of anonymous and shared memory",
        xlim=(0, minutes[-1]),
        ylim=(0, 1.5 * trend.mean_bytes / 1e6),
        title=f"{result.n_requests:,} requests, {result.n_bad:,} of them bad: "
        f"{trend.bytes_per_min / 1e6:+.3f} MB/min [{trend.low / 1e6:+.3f}, {trend.high / 1e6:+.3f}]",
    )
    axes.legend(loc="upper left", fontsize="x-small", ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _write_record(result: SoakResult, path: Path, **facts: Any) -> None:
    trends = {name: asdict(trend) for name, trend in result.trends().items()}
    data = {
        "schema": _KIND,
        "environment": asdict(environment()),
        **facts,
        "trends": trends,
        **{name: value for name, value in asdict(result).items() if name != "memory"},
        "memory_s": [round(at, 1) for at, _ in result.memory],
        "memory_mb": {
            name: [round(n.get(name, 0) / 1e6, 1) for _, n in result.memory] for name in result.memory[-1][1]
        },
    }
    lines = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()
    )
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    n_requests: Annotated[int, typer.Option("--requests", min=BAD_EVERY)] = 10_000,
    minutes: Annotated[float, typer.Option(min=0.1, help="The requests are spread over this time.")] = 12.0,
    record: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the memory over time.")] = None,
) -> None:
    """Soak-test a server; exit code 0 if all answers are right, nothing restarts and memory is flat."""
    requests = requests_of_soak(model, n_requests)
    front = tuple(f"{model.name}_{modality}" for modality in ("text", "image"))
    manifest = Manifest.read(model)
    key = manifest.front_ends[0].variant
    variant = manifest.variants[key]
    models = (*front, variant.text.model, variant.image.model)
    options = ServerOptions(models=models, arguments=_ARGUMENTS)
    with running_server(
        model.parent, environment=environment_from_folder(env or default_folder()), options=options
    ) as server:
        result = asyncio.run(_soak(server.addresses.grpc, requests, server.pid, minutes))
    trend, faults = result.trends()["all"], result.faults()
    typer.echo(
        f"{result.n_good_right}/{result.n_good} good right (error ≤ {result.max_error:.1e}), "
        f"{result.n_bad_refused}/{result.n_bad} bad refused, {result.seconds / 60:.1f} min, "
        f"{trend.mean_bytes / 1e6:.0f} MB, {trend.bytes_per_min / 1e6:+.3f} MB/min "
        f"[{trend.low / 1e6:+.3f}, {trend.high / 1e6:+.3f}]; {'; '.join(faults) or 'no faults'}"
    )
    if record is not None:
        _write_record(
            result, record, model=model.name, variant=key, arguments=_ARGUMENTS, faults=faults, flat=_FLAT
        )
    if plot is not None:
        _plot(result, plot)
    raise typer.Exit(int(bool(faults)))


if __name__ == "__main__":
    typer.run(main)
