"""Check that two runs of the suite on one machine agree within their stated intervals.

    python -m bench.repeatability FIRST SECOND

A cell agrees if the 95% intervals of its two medians overlap. A stricter count is shown too: cells whose
interval of the ratio contains 1, which 95% of equal cells should. For peers, the ratios within turns are
compared, since those are what a run states. Exit code 1 if less than the wanted share agrees.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

from bench.peers.verdicts import PeerVerdict, verdicts_of
from bench.records.record import Record, read_records, require_one_environment
from bench.records.statistics import bootstrap_median_interval, bootstrap_ratio_interval
from runtime.commands.reporting import ErrorReportingCommand
from runtime.errors import BabeltowerError

__all__ = ["RunAgreement", "agreements", "app"]

app = typer.Typer(add_completion=False)

_PEERS = "peers"


@dataclass(frozen=True, slots=True)
class RunAgreement:
    """Agreement of one cell in two runs.

    Attributes:
        ratio: Second ÷ first, medians over the processes' medians; for peers, of their ratios to babeltower.
        overlaps: True if the intervals of the two medians overlap.
        holds_one: True if the interval of the ratio contains 1.
        width: Width of the interval of the ratio, high ÷ low - 1: the smallest difference that would show.
    """

    cell: dict[str, str]
    ratio: float
    overlaps: bool
    holds_one: bool
    width: float


def agreements(first: Sequence[Record], second: Sequence[Record]) -> list[RunAgreement]:
    """Return the agreement of each cell that both runs measured.

    Raises:
        BabeltowerError: the runs are of different environments, or share no cell.
    """
    old_records, new_records = ([r for r in records if r.error is None] for records in (first, second))
    require_one_environment([*old_records, *new_records])
    by_cell = {tuple(sorted(r.cell.items())): r for r in new_records}
    found = []
    for old in old_records:
        new = by_cell.get(tuple(sorted(old.cell.items())))
        if new is None or old.cell["suite"] == _PEERS:
            continue
        intervals = [bootstrap_median_interval(record.by_process) for record in (old, new)]
        ratio = bootstrap_ratio_interval(old.by_process, new.by_process)
        medians = [statistics.median(map(statistics.median, r.by_process)) for r in (old, new)]
        found.append(
            RunAgreement(
                cell=dict(old.cell),
                ratio=medians[1] / medians[0],
                overlaps=intervals[0].overlaps(intervals[1]),
                holds_one=1.0 in ratio,
                width=ratio.high / ratio.low - 1,
            )
        )
    found += _agreements_of_peers(
        *([r for r in rs if r.cell["suite"] == _PEERS] for rs in (old_records, new_records))
    )
    if not found:
        raise BabeltowerError("The two runs share no measured cell; run the same command twice.")
    return found


def _agreements_of_peers(first: Sequence[Record], second: Sequence[Record]) -> Iterator[RunAgreement]:
    """Yield the agreement of each ratio, of the same two forms, that both runs state."""
    if not (first and second):
        return
    stated = {_key(verdict): verdict for verdict in verdicts_of(second)}
    for old in verdicts_of(first):
        if new := stated.get(_key(old)):
            overlaps = old.low <= new.high and new.low <= old.high
            names = {f"{i}": word for i, word in enumerate(_key(old)[:-1])}
            yield RunAgreement(
                cell={"suite": _PEERS, "metric": "ratio", **names},
                ratio=new.ratio / old.ratio,
                overlaps=overlaps,
                holds_one=overlaps,
                width=old.high / old.low - 1,
            )


def _key(verdict: PeerVerdict) -> tuple[str, ...]:
    forms = (
        " ".join(record.cell[k] for k in ("by", "engine", "precision"))
        for record in (verdict.own, verdict.peer)
    )
    return *verdict.place, *forms, verdict.precision


@app.command(cls=ErrorReportingCommand)
def repeatability(
    first: Annotated[Path, typer.Argument(help="File or folder of records.")],
    second: Annotated[Path, typer.Argument(help="File or folder of another run.")],
    wanted: Annotated[float, typer.Option(min=0, max=1, help="Share of cells that must agree.")] = 0.95,
) -> None:
    """Count the cells that agree, by metric, and name those that do not."""
    console = Console()
    found = agreements(read_records(first), read_records(second))
    table = Table("suite", "metric", "cells", "intervals overlap", "ratio's holds 1", "median width")
    groups: dict[tuple[str, str], list[RunAgreement]] = {}
    for agreement in found:
        groups.setdefault((agreement.cell["suite"], agreement.cell["metric"]), []).append(agreement)
    for names, cells in [*groups.items(), (("all", ""), found)]:
        overlap, one = (statistics.mean(map(bool, column)) for column in _columns(cells))
        width = statistics.median(cell.width for cell in cells)
        table.add_row(*names, str(len(cells)), f"{overlap:.1%}", f"{one:.1%}", f"{width:.1%}")
    console.print(table)
    for agreement in found:
        if not agreement.overlaps:
            cell = " ".join(value for value in agreement.cell.values() if value)
            console.print(f"{agreement.ratio:.3f}×  {cell}", style="yellow", markup=False)
    share = statistics.mean(agreement.overlaps for agreement in found)
    raise typer.Exit(0 if share >= wanted else 1)


def _columns(cells: Sequence[RunAgreement]) -> tuple[list[bool], list[bool]]:
    return [cell.overlaps for cell in cells], [cell.holds_one for cell in cells]


if __name__ == "__main__":
    app()
