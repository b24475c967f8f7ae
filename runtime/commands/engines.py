"""``babeltower engines``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from runtime.commands.options import AsJson, json_text

if TYPE_CHECKING:
    from runtime.backends.engine_reports import EngineReport

__all__ = ["engines"]


def engines(as_json: AsJson = False) -> None:
    """List what each engine can run on this machine, or why it cannot run and what to do."""
    from runtime.backends.engine_reports import engine_reports

    reports = engine_reports()
    if as_json:
        typer.echo(json_text([dataclasses.asdict(report) for report in reports]))
        return
    for line in _lines(reports):
        typer.echo(line)


def _lines(reports: Sequence[EngineReport]) -> Iterator[str]:
    widths = [max(len(column) for column in columns) for columns in zip(*map(_columns, reports), strict=True)]
    for report in reports:
        name, package = (text.ljust(width) for text, width in zip(_columns(report), widths, strict=True))
        if report.reason:
            yield f"{name}  {package}  cannot run: {report.reason}"
        else:
            precisions = " ".join(precision.value for precision in report.precisions)
            yield f"{name}  {package}  {precisions} on {', '.join(report.devices)}"


def _columns(report: EngineReport) -> tuple[str, str]:
    return report.engine.value, report.package or "-"
