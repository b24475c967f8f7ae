"""Render one page of all results: verdicts, speed, limits of the machine, peers, every language.

    python bench/report.py [FILE_OR_FOLDER …] [--out FILE]

The default is build/bench if 'make bench' wrote it, else the committed bench/results. The page needs no
network, and follows the reader's light or dark theme.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from bench.models.samples import ROOT
from bench.reporting.suite_data import results_from_paths
from bench.reporting.suite_page import page_from_results
from runtime.commands.reporting import ErrorReportingCommand
from runtime.storage import replace_text

__all__ = ["app"]


app = typer.Typer(add_completion=False)


@app.command(cls=ErrorReportingCommand)
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE_OR_FOLDER]...", help="build/bench if it exists, else bench/results."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Page to write; by default beside the results.")] = None,
) -> None:
    """Write the page of all results."""
    measured = ROOT / "build" / "bench"
    paths = results or [measured if any(measured.glob("*.json")) else ROOT / "bench" / "results"]
    found = results_from_paths(paths)
    if out is None:
        beside = paths[0] if paths[0].is_dir() else paths[0].parent
        out = measured / "index.html" if beside == ROOT / "bench" / "results" else beside / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page_from_results(found))
    typer.echo(f"page    {out}")


if __name__ == "__main__":
    app()
