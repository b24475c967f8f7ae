"""Run all benchmarks on the sample models, step by step.

    make bench          or        python -m bench.run [--out build/bench] [--only latency …]

Each step is a command of its own, whose output is shown as it runs. A step that fails, or has a bad verdict,
does not stop the others, so that the page shows everything available; the exit code is then 1.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.models.samples import ROOT
from bench.records.record import read_records
from runtime.commands.reporting import ErrorReportingCommand
from runtime.errors import BabeltowerError, InputError

__all__ = ["Step", "StepOutcome", "app", "run_steps", "steps_into"]


app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Step:
    """Command, and the file of records that it must write (``None`` if it writes none)."""

    name: str
    arguments: tuple[str, ...]
    records: Path | None


def steps_into(out: Path) -> tuple[Step, ...]:
    """Return the steps in order; peaks come first, since latencies are compared with them."""
    peaks, latency, throughput, corpus = (
        out / f"{name}.json" for name in ("peaks", "latency", "throughput", "corpus")
    )
    in_int8 = ("-m", "bench.retrieval", "nllb-clip", "--precision", "int8", "--engine", "openvino")
    held = ("--peaks", str(peaks))
    steps = [
        Step("peaks", ("-m", "bench.peaks", "--json", str(peaks)), peaks),
        Step("latency", ("-m", "bench.latency", *held, "--json", str(latency)), latency),
        Step(
            "throughput",
            ("-m", "bench.throughput", *held, "--json", str(throughput)),
            throughput,
        ),
        Step("retrieval", ("-m", "bench.retrieval", "--json", str(out / "retrieval.json")), None),
        Step("retrieval in INT8", (*in_int8, "--json", str(out / "retrieval-int8.json")), None),
        Step("corpus", ("-m", "bench.corpus", "--json", str(corpus)), corpus),
    ]
    if find_spec("bench.peers") is not None:
        peers = out / "peers.json"
        steps.append(Step("peers", ("-m", "bench.peers", "--json", str(peers)), peers))
    if find_spec("bench.report") is not None:
        page = out / "index.html"
        steps.append(Step("report", ("-m", "bench.report", str(out), "--out", str(page)), None))
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Outcome of a step; ``fault`` is empty on success."""

    name: str
    seconds: float
    fault: str


def run_steps(steps: Sequence[Step], console: Console) -> list[StepOutcome]:
    """Run all steps, and check the exit code and the records of each."""
    outcomes = []
    for step in steps:
        console.rule(step.name)
        if step.records is not None:
            step.records.unlink(missing_ok=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *step.arguments], check=False, cwd=ROOT)
        outcomes.append(StepOutcome(step.name, time.perf_counter() - started, _fault(step, done.returncode)))
    return outcomes


def _fault(step: Step, code: int) -> str:
    if code:
        return f"exit code {code}: python {' '.join(step.arguments)}"
    try:
        if step.records is not None:
            read_records(step.records)
    except BabeltowerError as error:
        return str(error)
    return ""


@app.command(cls=ErrorReportingCommand)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("build/bench"),
    only: Annotated[list[str] | None, typer.Option(help="Step to run; may be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Step to leave out; may be repeated.")] = None,
) -> None:
    """Run all benchmarks on the sample models."""
    console = Console()
    steps = steps_into(out.resolve())
    names = [step.name for step in steps]
    if unknown := [name for name in (*(only or ()), *(skip or ())) if name not in names]:
        raise InputError(f"There is no step {unknown[0]!r}; there are {names}.")
    chosen = [step for step in steps if step.name in (only or names) and step.name not in (skip or ())]
    outcomes = run_steps(chosen, console)
    table = Table("step", "seconds", "fault", title="The set")
    for outcome in outcomes:
        table.add_row(outcome.name, f"{outcome.seconds:.0f}", escape(outcome.fault) or "none")
    table.add_row("all", f"{sum(outcome.seconds for outcome in outcomes):.0f}", style="bold")
    console.print(table)
    raise typer.Exit(1 if any(outcome.fault for outcome in outcomes) else 0)


if __name__ == "__main__":
    app()
