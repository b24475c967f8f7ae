"""Measure the time of one run, per tower × precision × engine × batch × sequence length.

    python bench/latency.py                              a sample of each family, exported for it
    python bench/latency.py nllb-clip --batch 1,8        some samples, some shapes
    python bench/latency.py REPOSITORY/NAME              a model of your own

Every tower × engine × precision is opened several times, each time in a process of its own; processes that
are open together take turns, so that drift of the machine affects all of them alike. Wall time is the
caller's waiting time, CPU time the cost on a core. No time counts before the vectors were compared with
FP32's. Each result is shown beside the limit of this machine (``bench/timing/roofline.py``).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import onnx_ir
import typer
from numpy.typing import NDArray
from rich.console import Console

from bench.models.sample_exports import ENGINES_OF, FAMILIES, sample_exports
from bench.peaks import measure_peaks
from bench.records.record import Record, artefact_sha256, read_records, record_of, suite_cell, write_records
from bench.reporting.latency_tables import print_footprints, print_latencies, wide_console
from bench.timing.graph_costs import cost_of_graph
from bench.timing.measured_inputs import Shape, inputs_of_shape, shapes_of
from bench.timing.roofline import cost_settings
from bench.timing.timed_process import WORKER, GraphSpec, OpenedGraph, Pace, TimedProcess, Times
from export.parity.limits import limits_of
from runtime.commands.options import device_option
from runtime.commands.reporting import ErrorReportingCommand
from runtime.cosines import lowest_cosine
from runtime.device import device_from_name
from runtime.errors import BabeltowerError, InputError
from runtime.machine import available_memory_bytes
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Modality, Precision, TowerFiles, manifest_path

__all__ = [
    "DEFAULT_PRECISIONS",
    "Group",
    "LatencyPlan",
    "app",
    "chosen_groups",
    "groups_of_model",
    "measure_latency",
    "onnx_of",
    "stored_shapes",
]

DEFAULT_PRECISIONS = (Precision.FP32, Precision.BF16, Precision.INT8)
_BYTES_OF_A_PROCESS = 160 << 20
_COPIES_OF_A_GRAPH = 3
"""Memory that an engine takes to open a graph, in multiples of the file's size."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """Size of the measurement.

    Attributes:
        processes: Number of times that every graph is opened anew; intervals come from the variation between
            them.
        turns: Turns of each process over its shapes.
        device: GPU of the engines that run on one, as in ``open_backend``.
        worker: Program to start as the process; see ``bench.timing.timed_process``.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (16, 64)
    threads: int = 1
    processes: int = 5
    turns: int = 1
    pace: Pace = field(default_factory=lambda: Pace(seconds=0.05, min_runs=6))
    device: str | None = None
    worker: tuple[str, ...] = WORKER


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tower in one precision on one engine, opened by one process; ``error`` says why it cannot be."""

    model: Path
    manifest: Manifest
    modality: Modality
    engine: str
    precision: Precision
    files: TowerFiles | None
    error: str = ""

    @property
    def graph(self) -> Path:
        """File that the engine opens."""
        assert self.files is not None
        return self.model.parent / self.files.model / str(self.files.version) / self.files.graph

    @property
    def graph_files(self) -> tuple[Path, ...]:
        """Files of the graph and its weights."""
        return tuple(sorted(path for path in self.graph.parent.iterdir() if path.is_file()))

    def cell(self, metric: str, shape: Shape | None = None) -> dict[str, str]:
        """Return the name of one of its cells."""
        return suite_cell(
            suite="latency",
            metric=metric,
            model=self.manifest.name,
            family=self.manifest.family,
            tower=self.modality.value,
            engine=self.engine,
            precision=self.precision.value,
            batch=shape.batch if shape else None,
            tokens=shape.tokens if shape else None,
        )


@dataclass(slots=True)
class _Found:
    """Results of a group's processes."""

    opened: list[OpenedGraph] = field(default_factory=list)
    times: dict[Shape, list[Times]] = field(default_factory=dict)
    cosines: dict[Shape, float] = field(default_factory=dict)
    error: str = ""


def groups_of_model(
    model: Path,
    *,
    precisions: Sequence[Precision] = (),
    engines: Sequence[Engine] = (),
    errors: Mapping[Precision, str] | None = None,
) -> list[Group]:
    """Return the groups of a model to measure: all of them, or the requested ones.

    A requested group that the model does not have carries the reason.

    Args:
        errors: Reasons by precision that could not be exported.
    """
    manifest = Manifest.read(model)
    found: list[Group] = []
    for variant in manifest.variants.values():
        if precisions and variant.precision not in precisions:
            continue
        for engine in variant.engines:
            if not engines or engine in {chosen.value for chosen in engines}:
                found += [
                    Group(model, manifest, m, engine, variant.precision, variant.tower(m)) for m in Modality
                ]
    held = {(group.precision, group.engine) for group in found}
    for precision in precisions:
        reason = (errors or {}).get(precision)
        wanted = engines or (ENGINES_OF[precision] if reason else ())
        missing = [e.value for e in wanted if (precision, e.value) not in held]
        if not wanted and not any(p is precision for p, _ in held):
            missing = [""]
        for engine in missing:
            text = reason or f"{manifest.name} holds {sorted(manifest.variants)}: export what is missing."
            found += [Group(model, manifest, m, engine, precision, None, text) for m in Modality]
    return found


def measure_latency(
    groups: Sequence[Group], plan: LatencyPlan, console: Console | None = None
) -> list[Record]:
    """Measure every group in turns; a group that cannot run gets a record with its error."""
    found = {group: _Found(error=group.error) for group in groups}
    runnable = [group for group in groups if group.files is not None]
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {group: stored_shapes(group, plan, Path(scratch)) for group in runnable}
        for pack in _packs(runnable):
            for process in range(plan.processes):
                if console is not None:
                    console.print(
                        f"{len(pack)} graphs, process {process + 1} of {plan.processes} …", style="dim"
                    )
                _one_process_each(pack, shapes, plan, found, check=process == 0)
    records: list[Record] = []
    for group in groups:
        records += _records_of(group, found[group], plan)
    return records


def stored_shapes(group: Group, plan: LatencyPlan, scratch: Path) -> dict[Shape, Path]:
    """Write the inputs of each shape to files; groups of a tower share them."""
    manifest, stored = group.manifest, {}
    tokenizer = group.model.parent / next(iter(manifest.variants.values())).tokenizer
    shapes = shapes_of(manifest, group.modality, batches=plan.batches, tokens=plan.tokens)
    for shape in shapes:
        path = scratch / f"{manifest.name}-{group.modality.value}-{shape.batch}-{shape.tokens}.npz"
        if not path.is_file():
            np.savez(path, **inputs_of_shape(manifest, tokenizer, group.modality, shape))  # type: ignore[arg-type]
        stored[shape] = path
    return stored


def _packs(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Yield groups to open together: as many as fit into half of the free memory."""
    room = _free_bytes() // 2
    pack: list[Group] = []
    used = 0
    for group in groups:
        size = sum(path.stat().st_size for path in group.graph_files)
        need = _BYTES_OF_A_PROCESS + _COPIES_OF_A_GRAPH * size
        if pack and used + need > room:
            yield pack
            pack, used = [], 0
        pack.append(group)
        used += need
    if pack:
        yield pack


def _free_bytes() -> int:
    available = available_memory_bytes()
    if available is None:
        raise BabeltowerError("Free memory is read from /proc; this system has none. Measure on Linux.")
    return available


def _one_process_each(
    pack: Sequence[Group],
    shapes: Mapping[Group, Mapping[Shape, Path]],
    plan: LatencyPlan,
    found: Mapping[Group, _Found],
    *,
    check: bool,
) -> None:
    """Open every group once, compare its vectors the first time, and time it in turns."""
    opened: dict[Group, TimedProcess] = {}
    try:
        for group in pack:
            with _kept_error(found[group]):
                first = next(iter(shapes[group].values()))
                process = TimedProcess(_spec(group, plan), first, worker=plan.worker)
                opened[group] = process
                found[group].opened.append(process.opened)
        if check:
            _compare(opened, shapes, plan, found)
        for _ in range(plan.turns):
            for group, process in opened.items():
                with _kept_error(found[group]):
                    for shape, inputs in shapes[group].items():
                        times = process.times(inputs, plan.pace)
                        found[group].times.setdefault(shape, []).append(times)
    finally:
        for process in opened.values():
            process.close()


class _kept_error:  # noqa: N801 - reads as a statement
    """Context manager that keeps a group's first error and skips the rest of the block."""

    def __init__(self, found: _Found) -> None:
        self._found = found

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, BabeltowerError):
            self._found.error = self._found.error or str(error)
            return True
        return False


def _spec(group: Group, plan: LatencyPlan) -> GraphSpec:
    assert group.files is not None
    output = group.files.outputs[str(group.manifest.dim)]
    device = plan.device if Engine(group.engine) in GPU_ENGINES else None
    return GraphSpec(
        str(group.graph), group.engine, group.precision.value, plan.threads, output, device=device
    )


def _compare(
    opened: Mapping[Group, TimedProcess],
    shapes: Mapping[Group, Mapping[Shape, Path]],
    plan: LatencyPlan,
    found: Mapping[Group, _Found],
) -> None:
    """Compare every graph's vectors with FP32's on the timed inputs, if the model has FP32."""
    references: dict[Path, NDArray[np.float64] | None] = {}
    for group, process in opened.items():
        for shape, inputs in shapes[group].items():
            with _kept_error(found[group]):
                if inputs not in references:
                    references[inputs] = _reference(group, inputs, opened, plan)
                reference = references[inputs]
                if reference is None:
                    continue
                cosine = lowest_cosine(process.vectors(inputs), reference)
                found[group].cosines[shape] = cosine
                limit = limits_of(group.precision, Engine(group.engine)).min_cosine
                if not cosine >= limit:
                    raise BabeltowerError(
                        f"Its vectors differ from FP32's at {shape}: cosine {cosine:.5f}, expected "
                        f"at least {limit}. Its speed is not valid; export it again."
                    )


def _reference(
    group: Group, inputs: Path, opened: Mapping[Group, TimedProcess], plan: LatencyPlan
) -> NDArray[np.float64] | None:
    """Return FP32's vectors, from a process that is already open if possible; ``None`` without FP32."""
    for other, process in opened.items():
        same = (other.model, other.modality) == (group.model, group.modality)
        if same and other.precision is Precision.FP32:
            return process.vectors(inputs)
    fp32 = [v for v in group.manifest.variants.values() if v.precision is Precision.FP32]
    if not fp32:
        return None
    files = fp32[0].tower(group.modality)
    other = Group(group.model, group.manifest, group.modality, fp32[0].engines[0], Precision.FP32, files)
    process = TimedProcess(_spec(other, plan), inputs)
    try:
        return process.vectors(inputs)
    finally:
        process.close()


def _records_of(group: Group, found: _Found, plan: LatencyPlan) -> Iterator[Record]:
    settings = {"threads": plan.threads, "turns": plan.turns}
    if found.error or not found.opened:
        shapes = shapes_of(group.manifest, group.modality, batches=plan.batches, tokens=plan.tokens)
        for shape in shapes:
            for metric in ("wall", "cpu"):
                cell = group.cell(metric, shape)
                yield record_of(cell, [], unit="ms", settings=settings, error=found.error or "never opened")
        return
    artefact = artefact_sha256(*group.graph_files)
    once = [1] * len(found.opened)
    for metric, unit, values in (
        ("load", "ms", [opened.load_ms for opened in found.opened]),
        ("first", "ms", [opened.first_ms for opened in found.opened]),
        ("resident", "MB", [opened.resident_mb for opened in found.opened]),
    ):
        cell = group.cell(metric)
        yield record_of(cell, values, unit=unit, settings=settings, artefact=artefact, processes=once)
    graph = onnx_ir.load(onnx_of(group))
    for shape, times in found.times.items():
        own = {
            **settings,
            "min_cosine": found.cosines.get(shape),
            **cost_settings(cost_of_graph(graph, group.precision, shape.sizes)),
        }
        columns = {"wall": [t.wall_ms for t in times], "cpu": [t.cpu_ms for t in times]}
        if all(t.device_ms for t in times):
            columns["device"] = [t.device_ms for t in times]
        for metric, turns in columns.items():
            samples = [round(value, 5) for turn in turns for value in turn]
            sizes = [
                sum(len(turn) for turn in turns[at : at + plan.turns])
                for at in range(0, len(turns), plan.turns)
            ]
            yield record_of(
                group.cell(metric, shape),
                samples,
                unit="ms",
                settings=own,
                artefact=artefact,
                processes=sizes,
            )


def onnx_of(group: Group) -> Path:
    """Return the ONNX file of a graph; a TensorRT plan has its source beside it."""
    return group.graph if group.graph.suffix == ".onnx" else group.graph.with_name("model.onnx")


def chosen_groups(
    models: Sequence[str], *, precisions: Sequence[Precision], engines: Sequence[Engine], console: Console
) -> list[Group]:
    """Return the groups of samples, exported if missing, and of models in repositories.

    Raises:
        InputError: a name is neither a sample nor a model.
    """
    names = list(models or FAMILIES)
    samples = [name for name in names if not manifest_path(name).is_file()]
    for name in samples:
        if "/" in name:
            raise InputError(
                f"There is no model {name}: {manifest_path(name)} is missing. Name REPOSITORY/NAME, or one "
                f"of the samples ({', '.join(FAMILIES)}, …)."
            )
    exports = {}
    if samples:
        console.print(f"{', '.join(samples)}: exporting unless they exist …", style="dim")
        wanted = tuple(dict.fromkeys((Precision.FP32, *(precisions or DEFAULT_PRECISIONS))))
        exports = dict(zip(samples, sample_exports(samples, wanted), strict=True))
    groups: list[Group] = []
    for name in names:
        if name not in exports:
            groups += groups_of_model(Path(name), precisions=precisions, engines=engines)
            continue
        done = exports[name]
        groups += groups_of_model(
            done.model, precisions=precisions or DEFAULT_PRECISIONS, engines=engines, errors=done.errors
        )
    return groups


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,8,32.") from None
    if min(found) < 1:
        raise typer.BadParameter(f"{min(found)} is less than 1.")
    return found


@app.command(cls=ErrorReportingCommand)
def latency(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Samples or REPOSITORY/NAME; by default one per family."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows per run, comma separated.")] = "1,8,32",
    tokens: Annotated[str, typer.Option(help="Tokens per text, comma separated.")] = "16,64",
    precision: Annotated[list[Precision] | None, typer.Option(help="May be repeated.")] = None,
    engine: Annotated[list[Engine] | None, typer.Option(help="May be repeated.")] = None,
    device: Annotated[str | None, device_option("", "For --engine cuda and tensorrt: ")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one run.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Number of times to open each graph.")] = 5,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each process over its shapes.")] = 1,
    peaks: Annotated[
        Path | None, typer.Option(help="Records of bench/peaks.py; measured if not given.")
    ] = None,
    record: Annotated[Path, typer.Option("--json", help="File of the records.")] = Path(
        "build/bench/latency.json"
    ),
) -> None:
    """Time every graph of some models, and print percentiles and the share of this machine's limit."""
    console = wide_console()
    if device is not None:
        device_from_name(device)
    plan = LatencyPlan(_numbers(batch), _numbers(tokens), threads, processes, turns, device=device)
    groups = chosen_groups(models or [], precisions=precision or [], engines=engine or [], console=console)
    if peaks is not None:
        limits = read_records(peaks)
    else:
        gpu = any(group.engine in {engine.value for engine in GPU_ENGINES} for group in groups)
        limits = measure_peaks(turns=5, threads=threads, gpu=gpu)
    records = measure_latency(groups, plan, console)
    write_records([*records, *(limits if peaks is None else [])], record)
    print_latencies(records, limits, console)
    print_footprints(records, console)
    console.print(f"records  {record}", markup=False, soft_wrap=True)
    failed = [r for r in records if r.error is not None]
    raise typer.Exit(1 if len(failed) == len(records) else 0)


if __name__ == "__main__":
    app()
