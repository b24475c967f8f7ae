"""Measure rows per second at saturation, in process on every core and through Triton.

    python bench/throughput.py                         one sample, in process and through a server
    python bench/throughput.py capivara --no-server    another one, in process alone
    python bench/throughput.py REPOSITORY/NAME         a model of your own

In process, the cores run one instance with all threads, then single-threaded instances. The server and its
clients are restricted to the same cores: first clients that wait for their answers (closed loop), then
requests that arrive independently at shares of the highest rate (open loop), whose latency is drawn against
the load. One text or image per request.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import onnx_ir
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.latency import Group, LatencyPlan, chosen_groups, onnx_of, stored_shapes
from bench.peaks import measure_peaks
from bench.records.record import Record, artefact_sha256, read_records, record_of, suite_cell, write_records
from bench.records.statistics import bootstrap_median_interval
from bench.reporting.latency_tables import wide_console
from bench.reporting.load_curve import draw_load_curve
from bench.timing.graph_costs import cost_of_graph
from bench.timing.measured_inputs import Shape
from bench.timing.roofline import Peaks, cost_settings, peaks_from_records, share_of_limit
from bench.timing.server_requests import open_loop
from bench.timing.timed_process import GraphSpec, Rates, TimedProcess
from export.retrieval.sample_set import sample_retrieval_set
from export.tuning.load_generator import Load, image_requests, load_of_server, text_requests
from runtime.commands.options import device_option
from runtime.commands.reporting import ErrorReportingCommand
from runtime.device import device_from_name
from runtime.errors import BabeltowerError, EngineError
from runtime.machine import n_cores
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Modality, Precision
from runtime.server import ServerOptions, default_folder, environment_from_folder, running_server

__all__ = ["Saturation", "ServerLoad", "app", "measure_in_process", "measure_server"]

_N_REQUESTS = 512

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Saturation:
    """Size of the in-process measurement; ``sharings`` are (instances, threads of each).

    Attributes:
        device: GPU of the engines that run on one, as in ``open_backend``.
    """

    batches: tuple[int, ...] = (8, 32)
    tokens: tuple[int, ...] = (16,)
    sharings: tuple[tuple[int, int], ...] = ()
    processes: int = 4
    turns: int = 2
    seconds: float = 0.25
    device: str | None = None


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Size of the measurement through a server.

    Attributes:
        clients: Numbers of clients of the closed loops.
        shares: Shares of the highest closed-loop rate, for the open loops.
        seconds: Approximate duration of each loop.
        runs: Runs of every closed loop.
    """

    clients: tuple[int, ...] = (1, 8, 32)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    seconds: float = 2.0
    runs: int = 3


def sharings_of(cores: int) -> tuple[tuple[int, int], ...]:
    """Return one instance on all cores, and one instance per core."""
    return tuple(dict.fromkeys(((1, cores), (cores, 1))))


def measure_in_process(groups: Sequence[Group], plan: Saturation, console: Console) -> list[Record]:
    """Measure rows per second of every graph, batch and sharing of the cores."""
    records: list[Record] = []
    shape_plan = LatencyPlan(batches=plan.batches, tokens=plan.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        for group in groups:
            if group.files is None:
                error = record_of(_cell(group, None, ""), [], unit="rows/s", settings={}, error=group.error)
                records.append(error)
                continue
            name = f"{group.manifest.name} {group.modality.value} {group.precision.value} {group.engine}"
            console.print(f"{name} …", style="dim", highlight=False)
            shapes = stored_shapes(group, shape_plan, Path(scratch))
            for instances, threads in plan.sharings or sharings_of(n_cores()):
                records += _saturated(group, shapes, (instances, threads), plan)
    return records


def _saturated(
    group: Group, shapes: dict[Shape, Path], sharing: tuple[int, int], plan: Saturation
) -> Iterator[Record]:
    assert group.files is not None
    instances, threads = sharing
    load = f"{instances}×{threads}"
    output = group.files.outputs[str(group.manifest.dim)]
    device = plan.device if Engine(group.engine) in GPU_ENGINES else None
    spec = GraphSpec(
        str(group.graph), group.engine, group.precision.value, threads, output, instances, device=device
    )
    settings = {"threads": threads, "instances": instances, "turns": plan.turns, "seconds": plan.seconds}
    rates: dict[Shape, list[Rates]] = {shape: [] for shape in shapes}
    try:
        for _ in range(plan.processes):
            process = TimedProcess(spec, next(iter(shapes.values())))
            try:
                for _ in range(plan.turns):
                    for shape, inputs in shapes.items():
                        rates[shape].append(process.saturate(inputs, plan.seconds))
            finally:
                process.close()
    except BabeltowerError as error:
        for shape in shapes:
            cell = _cell(group, shape, load)
            yield record_of(cell, [], unit="rows/s", settings=settings, error=str(error))
        return
    graph, artefact = onnx_ir.load(onnx_of(group)), artefact_sha256(*group.graph_files)
    for shape, found in rates.items():
        cost = cost_settings(cost_of_graph(graph, group.precision, shape.sizes))
        yield record_of(
            _cell(group, shape, load),
            [rate.rows_per_s for rate in found],
            unit="rows/s",
            settings={**settings, **cost, "rows_per_core_s": [rate.rows_per_core_s for rate in found]},
            artefact=artefact,
            processes=[plan.turns] * plan.processes,
        )


def _cell(group: Group, shape: Shape | None, load: str) -> dict[str, str]:
    return suite_cell(
        suite="throughput",
        metric="rate",
        model=group.manifest.name,
        family=group.manifest.family,
        tower=group.modality.value,
        engine=group.engine,
        precision=group.precision.value,
        batch=shape.batch if shape else None,
        tokens=shape.tokens if shape else None,
        load=load,
    )


def measure_server(
    model: Path, environment: Path, load: ServerLoad, console: Console, *, modalities: Sequence[Modality]
) -> list[Record]:
    """Measure the model's front ends in closed and open loops; an error becomes a record."""
    manifest = Manifest.read(model)
    records: list[Record] = []
    try:
        if not manifest.front_ends:
            raise BabeltowerError(f"{model} has no front ends; write them with `babeltower frontends`.")
        (front_ends,) = manifest.front_ends
        variant = manifest.variants[front_ends.variant]
        names = {Modality.TEXT: front_ends.text, Modality.IMAGE: front_ends.image}
        towers = [variant.tower(modality).model for modality in modalities]
        options = ServerOptions(models=(*(names[m] for m in modalities), *towers))
        made = environment_from_folder(environment)
        with running_server(model.parent, environment=made, options=options) as server:
            for modality in modalities:
                console.print(f"{names[modality]} through Triton …", style="dim", highlight=False)
                cell = functools.partial(
                    suite_cell,
                    suite="server",
                    model=manifest.name,
                    family=manifest.family,
                    tower=modality.value,
                    engine=variant.engines[0],
                    precision=variant.precision.value,
                    batch=1,
                )
                requests = _requests(manifest, modality, names[modality])
                records += _loaded(server.addresses.grpc, requests, load, cell)
    except BabeltowerError as error:
        missing = suite_cell(suite="server", metric="rate", model=manifest.name, family=manifest.family)
        records.append(record_of(missing, [], unit="requests/s", settings={}, error=str(error)))
    return records


def _requests(manifest: Manifest, modality: Modality, model: str) -> list[bytes]:
    """Return requests from the samples, one text in any of the tower's languages, or drawing, each."""
    dataset = sample_retrieval_set()
    if modality is Modality.IMAGE:
        return image_requests(model, [image.read() for image in dataset.images[:_N_REQUESTS]])
    entries = [entry for entry in dataset.captions if entry.language in manifest.languages]
    random = np.random.default_rng(0)
    chosen = [entries[at] for at in random.integers(0, len(entries), _N_REQUESTS)]
    texts = [entry.texts[random.integers(0, len(entry.texts))] for entry in chosen]
    named = manifest.text.needs_language
    return text_requests(model, texts, [entry.language if named else None for entry in chosen])


def _loaded(
    address: str, requests: Sequence[bytes], load: ServerLoad, cell: Callable[..., dict[str, str]]
) -> Iterator[Record]:
    """Run closed loops of each number of clients, then open ones at shares of the highest rate."""

    def closed(clients: int) -> Load:
        found = load_of_server(address, requests, clients=clients, seconds=load.seconds)
        if found.failures:
            message, n = next(iter(found.failures.items()))
            raise EngineError(f"{n} requests failed under load: {message}")
        return found

    highest = closed(max(load.clients)).rate
    for clients in load.clients:
        loops = [closed(clients) for _ in range(load.runs)]
        highest = max(highest, *(loop.rate for loop in loops))
        settings = {"clients": clients, "runs": load.runs}
        latencies = [loop.latencies_ms for loop in loops]
        yield _latency_record(cell(metric="wall", load=f"closed {clients}"), latencies, settings)
        yield record_of(
            cell(metric="rate", load=f"closed {clients}"),
            [loop.rate for loop in loops],
            unit="requests/s",
            settings=settings,
            processes=[1] * load.runs,
        )
    for share in load.shares:
        offered = highest * share
        n = max(16, round(offered * load.seconds))
        latencies = [open_loop(address, requests, per_s=offered, n=n, seed=seed) for seed in range(load.runs)]
        offer = {"offered_per_s": offered, "runs": load.runs}
        yield _latency_record(cell(metric="wall", load=f"open {share:.0%}"), latencies, offer)


def _latency_record(
    cell: dict[str, str], latencies: Sequence[NDArray[np.float64]], settings: dict[str, Any]
) -> Record:
    return record_of(
        cell,
        [round(float(value), 4) for loop in latencies for value in loop],
        unit="ms",
        settings=settings,
        processes=[len(loop) for loop in latencies],
    )


def print_throughput(records: Sequence[Record], peaks: Peaks, console: Console) -> None:
    """Print rows per second in process, then the server's latencies at each rate."""
    keys = ("model", "tower", "precision", "engine", "batch", "tokens", "load")
    table = Table(*keys, "rows/s", "95%", "of limit", title="In process", box=box.SIMPLE_HEAD)
    served = Table(
        *("model", "tower", "precision", "load", "requests/s", "p50 ms", "p90", "p99"),
        title="Through Triton",
        box=box.SIMPLE_HEAD,
    )
    rates = {_by_load(r): r for r in records if r.cell["suite"] == "server" and r.cell["metric"] == "rate"}
    for record in records:
        cell = record.cell
        if record.error is not None:
            console.print(f"not measured: {record.error}", style="red", markup=False, soft_wrap=True)
        elif cell["suite"] == "throughput":
            interval = bootstrap_median_interval(record.by_process)
            row = [cell.get(key, "") for key in keys]
            share = share_of_limit(record, peaks)
            table.add_row(
                *row,
                f"{record.median:,.0f}",
                f"{interval.low:,.0f}–{interval.high:,.0f}",
                "–" if share is None else f"{share:.0%}",
            )
        elif cell["metric"] == "wall":
            rate = record.settings.get("offered_per_s") or rates[_by_load(record)].median
            shown = [f"{value:.1f}" for value in np.percentile(record.samples, (50, 90, 99))]
            row = [cell[key] for key in ("model", "tower", "precision", "load")]
            served.add_row(*row, f"{rate:,.0f}", *shown)
    for shown_table in (table, served):
        if shown_table.row_count:
            console.print(shown_table)


def _by_load(record: Record) -> tuple[str, ...]:
    return tuple(record.cell[key] for key in ("model", "tower", "load"))


@app.command(cls=ErrorReportingCommand)
def throughput(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Samples, or REPOSITORY/NAME.")
    ] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="May be repeated.")] = None,
    engine: Annotated[list[Engine] | None, typer.Option(help="May be repeated.")] = None,
    server: Annotated[bool, typer.Option(help="Measure through Triton too.")] = True,
    env: Annotated[
        Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV", help="The server's environment.")
    ] = None,
    device: Annotated[str | None, device_option("", "For --engine cuda and tensorrt: ")] = None,
    peaks: Annotated[
        Path | None, typer.Option(help="Records of bench/peaks.py; measured if not given.")
    ] = None,
    record: Annotated[Path, typer.Option("--json", help="File of the records.")] = Path(
        "build/bench/throughput.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="SVG or PNG; beside the records by default.")] = None,
) -> None:
    """Measure rows per second at saturation, and latency against load."""
    console = wide_console()
    if device is not None:
        device_from_name(device)
    names = models or ["nllb-clip"]
    groups = chosen_groups(names, precisions=precision or [], engines=engine or [], console=console)
    limits = read_records(peaks) if peaks is not None else measure_peaks(turns=5, gpu=False)
    records = measure_in_process(groups, Saturation(device=device), console)
    if server:
        for model in dict.fromkeys(group.model for group in groups):
            folder = env or default_folder()
            records += measure_server(model, folder, ServerLoad(), console, modalities=tuple(Modality))
    write_records([*records, *(limits if peaks is None else [])], record)
    print_throughput(records, peaks_from_records(limits), console)
    curve = plot or record.with_suffix(".svg")
    draw_load_curve(records, curve)
    console.print(f"records  {record}", markup=False, soft_wrap=True)
    if curve.is_file():
        console.print(f"curve    {curve}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if all(found.error is not None for found in records) else 0)


if __name__ == "__main__":
    app()
