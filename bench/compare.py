"""Compare a run with an earlier one and report changes beyond noise, for use in CI.

    python bench/compare.py OLD NEW [--tolerance 3] [--json FILE]

OLD and NEW are files or folders of records, and of the reports of ``bench/retrieval.py``. Cells are paired by
name. The interval of a ratio is a bootstrap over processes and their samples; over all cells together, at
most 5% of the reported changes are expected to be chance. Recall is compared query by query. Exit code 1:
something is worse, failed or missing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

from bench.records.changes import (
    Change,
    Outcome,
    changes_of_records,
    changes_of_retrieval,
    judged,
    require_comparable,
)
from bench.records.record import NoRecordsError, Record, read_records
from bench.records.retrieval import retrieval_records
from runtime.commands.reporting import ErrorReportingCommand
from runtime.errors import BabeltowerError

__all__ = ["app", "compare_runs"]

app = typer.Typer(add_completion=False)


def compare_runs(
    old: Path, new: Path, *, tolerance: float = 0.03, different_environments: bool = False
) -> list[Change]:
    """Return the change of every cell of either run, the worst first.

    Args:
        tolerance: Changes of speed and size up to this share of the old value count as unchanged.

    Raises:
        BabeltowerError: the runs are of different machines or packages, are broken, or share no cell.
    """
    reports = retrieval_records(old), retrieval_records(new)
    records = _records(old, reports[0]), _records(new, reports[1])
    if not different_environments:
        require_comparable(*records)
    found = changes_of_records(*records)
    for key in sorted({*reports[0], *reports[1]}):
        if key in reports[0] and key in reports[1]:
            found += changes_of_retrieval(reports[0][key], reports[1][key])
        else:
            outcome = Outcome.MISSING if key in reports[0] else Outcome.NEW
            found.append(Change(f"retrieval: {key}", "", None, None, 0.0, None, 1.0, outcome))
    if all(change.outcome in (Outcome.MISSING, Outcome.NEW) for change in found):
        raise BabeltowerError(f"{old} and {new} share no measured cell; run the same command twice.")
    return judged(found, tolerance=tolerance)


@app.command(cls=ErrorReportingCommand)
def compare(
    old: Annotated[Path, typer.Argument(help="File or folder of records.")],
    new: Annotated[Path, typer.Argument(help="File or folder of the run to check.")],
    tolerance: Annotated[float, typer.Option(min=0, help="Allowed change of speed and size, percent.")] = 3.0,
    allow_missing: Annotated[bool, typer.Option(help="Accept cells that NEW lacks.")] = False,
    different_environments: Annotated[
        bool, typer.Option(help="Compare runs of different machines or packages.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every cell's comparison.")] = None,
) -> None:
    """Compare two runs; exit code 1 if the second is worse."""
    changes = compare_runs(old, new, tolerance=tolerance / 100, different_environments=different_environments)
    console = Console(width=150)
    if shown := [change for change in changes if change.outcome not in (Outcome.SAME, Outcome.NEW)]:
        console.print(_table(shown))
    counts = Counter(change.outcome for change in changes)
    console.print(", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome]))
    if json_file is not None:
        data = {"schema": "babeltower-comparison/1", "changes": [dataclasses.asdict(c) for c in changes]}
        json_file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fatal = {Outcome.WORSE, Outcome.FAILED} | (set() if allow_missing else {Outcome.MISSING})
    raise typer.Exit(1 if fatal & counts.keys() else 0)


def _records(path: Path, reports: object) -> list[Record]:
    """Return the records of a run; none if it has only retrieval reports."""
    try:
        return [] if reports and path.is_file() else read_records(path)
    except NoRecordsError:
        if reports:
            return []
        raise


def _table(changes: Sequence[Change]) -> Table:
    table = Table("", "cell", "old", "new", "change", "95% of new ÷ old", "")
    for change in changes:
        style = {"worse": "red", "failed": "red", "missing": "yellow", "better": "green"}.get(
            change.outcome.value
        )
        ends = f"{change.interval.low:.3f}–{change.interval.high:.3f}" if change.interval else ""
        table.add_row(
            change.outcome.value,
            change.name,
            *("" if value is None else f"{value:.4g} {change.unit}" for value in (change.old, change.new)),
            _amount(change),
            ends,
            change.note,
            style=style,
        )
    return table


def _amount(change: Change) -> str:
    if change.old is None or change.new is None:
        return ""
    if change.unit == "%":
        return f"{change.new - change.old:+.2f} points"
    return f"{change.new / change.old:.3f}×"


if __name__ == "__main__":
    app()
