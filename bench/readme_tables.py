"""Render the tables of README.md and docs/ from the committed records.

    python -m bench.readme_tables           write them
    python -m bench.readme_tables --check   only list stale pages; exit code 1 if there are any

A table is between two lines, ``<!-- table: NAME -->`` and ``<!-- end -->``; everything between them is
replaced. ``TABLES`` names each table's record in bench/results/ and the command that measures it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from bench.models.samples import ROOT
from bench.records.record import Record, read_records
from bench.reporting.immich_table import immich_table, service_table
from bench.reporting.pruned_table import pruned_table
from bench.reporting.record_tables import (
    corpus_table,
    costs_table,
    peer_errors_table,
    peers_table,
    portable_speed_table,
    precisions_table,
    rates_table,
    recall_table,
    server_table,
    simulated_table,
    speed_table,
    summary_table,
)
from runtime.commands.reporting import ErrorReportingCommand
from runtime.errors import BabeltowerError
from runtime.storage import replace_text

__all__ = ["RESULTS", "TABLES", "Table", "app", "pages", "rendered", "table_from_results"]

RESULTS = ROOT / "bench" / "results"

_BEGIN = re.compile(r"<!-- table: (?P<name>[\w-]+) -->")
_END = "<!-- end -->"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Table:
    """Record, the command that measures it, and the function that renders its file as Markdown."""

    record: str
    command: str
    render: Callable[[Path], str]


def _of_records(render: Callable[[Sequence[Record]], str]) -> Callable[[Path], str]:
    return lambda path: render(read_records(path))


def _of_json(render: Callable[[Mapping[str, Any]], str]) -> Callable[[Path], str]:
    return lambda path: render(json.loads(path.read_text(encoding="utf-8")))


def _precisions(path: Path) -> str:
    """Render the record and its counterpart of another machine in the folder ``avx2`` beside it."""
    return precisions_table(*_both_machines(path))


def _summary(path: Path) -> str:
    """Render the records of ``_precisions`` with the speeds in the same folder."""
    return summary_table(*_both_machines(path), read_records(path.with_name("precision_speed.json")))


def _both_machines(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    beside = path.parent / "avx2" / path.name
    if not beside.is_file():
        raise BabeltowerError(f"{beside} is missing. Run python -m bench.precisions on a CPU without VNNI.")
    record, avx2 = (json.loads(found.read_text(encoding="utf-8")) for found in (path, beside))
    return record, avx2


_PRECISIONS = ("precisions.json", "python -m bench.precisions")
_CORPUS = ("corpus.json", "python -m bench.corpus --work FOLDER")
_PEERS = ("peers.json", "python -m bench.peers")

TABLES: Mapping[str, Table] = {
    "summary": Table(*_PRECISIONS, _summary),
    "recall": Table(*_PRECISIONS, _of_json(recall_table)),
    "precisions": Table(*_PRECISIONS, _precisions),
    "speed": Table("precision_speed.json", "python -m bench.precision_speed", _of_records(speed_table)),
    "speed-avx2": Table(
        "avx2/precision_speed.json", "python -m bench.precision_speed", _of_records(portable_speed_table)
    ),
    "corpus": Table(*_CORPUS, _of_records(corpus_table)),
    "corpus-rates": Table(*_CORPUS, _of_records(rates_table)),
    "corpus-costs": Table(*_CORPUS, _of_records(costs_table)),
    "server": Table("server_load.json", "python -m bench.server_load MODEL …", _of_records(server_table)),
    "cuda-packed-simulated": Table(
        "cuda_packed_simulated.json",
        "python -m bench.gpu simulate --form packed",
        _of_records(simulated_table),
    ),
    "cuda-simulated": Table(
        "cuda_simulated.json",
        "python -m bench.gpu simulate --form fp16 --form bf16",
        _of_records(simulated_table),
    ),
    "immich": Table("immich.json", "python -m bench.immich --work FOLDER", _of_records(immich_table)),
    "immich-service": Table(
        "immich_service.json", "python -m bench.immich_service --work FOLDER", _of_records(service_table)
    ),
    "pruned": Table("pruned.json", "python -m bench.pruned --work FOLDER", _of_records(pruned_table)),
    "peers": Table(*_PEERS, _of_records(peers_table)),
    "peer-errors": Table(*_PEERS, _of_records(peer_errors_table)),
}


def table_from_results(name: str, results: Path) -> str:
    """Render one table from its record in a folder.

    Raises:
        BabeltowerError: there is no such table, or its record is missing or in another format.
    """
    if name not in TABLES:
        raise BabeltowerError(f"There is no table {name!r}; there are {sorted(TABLES)}.")
    table = TABLES[name]
    path = results / table.record
    if not path.is_file():
        raise BabeltowerError(
            f"The table {name!r} is rendered from {path}, which does not exist; measure it: "
            f"{table.command} --json {path}"
        )
    return table.render(path)


def rendered(page: str, results: Path) -> str:
    """Return a page's text with every marked table rendered anew.

    Raises:
        BabeltowerError: a mark has no end, or its table cannot be rendered.
    """
    lines, out = iter(page.splitlines()), []
    for line in lines:
        out.append(line)
        if begin := _BEGIN.fullmatch(line):
            _skip_to_end(lines, line)
            out += ["", *table_from_results(begin["name"], results).splitlines(), "", _END]
    return "\n".join(out) + "\n"


def _skip_to_end(lines: Iterator[str], begin: str) -> None:
    for line in lines:
        if line == _END:
            return
        if _BEGIN.fullmatch(line):
            break
    raise BabeltowerError(f"{begin} has no {_END} after its table; add that line.")


def pages(root: Path) -> list[Path]:
    """Return the pages that have marked tables."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if any(map(_BEGIN.fullmatch, path.read_text("utf-8").splitlines()))]


@app.command(cls=ErrorReportingCommand)
def readme_tables(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; list stale pages.")] = False,
) -> None:
    """Render the measured tables of README.md and docs/ from bench/results/."""
    stale = {}
    for path in pages(ROOT):
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text, RESULTS)) != text:
            stale[path] = new
    for path, new in stale.items():
        if not check:
            replace_text(path, new)
        typer.echo(f"{'stale' if check else 'rendered'}  {path.relative_to(ROOT)}")
    raise typer.Exit(1 if check and stale else 0)


if __name__ == "__main__":
    app()
