"""Tables of latencies: percentiles, the interval of the median, and the share of the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.records.record import Record
from bench.records.statistics import bootstrap_median_interval
from bench.timing.roofline import peaks_from_records, share_of_limit

__all__ = ["print_footprints", "print_latencies", "wide_console"]

_KEYS = ("model", "tower", "precision", "engine", "batch", "tokens")
_COLUMNS = ("p50 ms", "p90", "p99", "CPU ms", "95%", "rows/s", "of limit", "cosine")
_TABLE_WIDTH = 122

_ByMetric = dict[str, Record]


def wide_console() -> Console:
    """Return a console as wide as the tables, even without a terminal; narrow terminals wrap."""
    return Console(width=max(_TABLE_WIDTH, Console().width))


def print_latencies(records: Sequence[Record], peaks: Sequence[Record], console: Console) -> None:
    """Print a table per model, a row per shape: wall and CPU time, interval, share of the limit.

    Percentiles are over the runs of all processes; the p99 of a few dozen runs is nearly the slowest of them.
    """
    limits = [peaks_from_records(peaks, gpu=gpu) for gpu in _devices(peaks)]
    tables: dict[str, Table] = {}
    for key, found in _by_key(records, _KEYS, ("wall", "cpu", "device")).items():
        table = tables.setdefault(key[0], _table(*_KEYS[1:], *_COLUMNS, title=key[0]))
        wall, cpu = found["wall"], found["cpu"]
        if wall.error is not None:
            table.add_row(*key[1:], "–", style="dim")
            continue
        p50, p90, p99 = np.percentile(wall.samples, (50, 90, 99))
        interval = bootstrap_median_interval(cpu.by_process)
        shares = [share_of_limit(found.get("device", wall), limit) for limit in limits]
        share = next((share for share in shares if share is not None), None)
        cosine = wall.settings["min_cosine"]
        table.add_row(
            *key[1:],
            *(f"{value:.3g}" for value in (p50, p90, p99)),
            f"{cpu.median:.3g}",
            f"{interval.low:.3g}–{interval.high:.3g}",
            f"{1e3 * int(key[4]) / p50:,.0f}",
            "–" if share is None else f"{share:.0%}",
            "–" if cosine is None else f"{cosine:.5f}",
        )
    for table in tables.values():
        console.print(table)
    _print_errors(records, console)


def _devices(peaks: Sequence[Record]) -> list[bool]:
    """Return one value per kind of peaks in the records: True for a GPU's."""
    return sorted({record.cell["engine"] == "cuda" for record in peaks if record.error is None})


def _by_key(
    records: Sequence[Record], keys: Sequence[str], metrics: Sequence[str]
) -> dict[tuple[str, ...], _ByMetric]:
    found: dict[tuple[str, ...], _ByMetric] = {}
    for record in records:
        if record.cell["metric"] in metrics:
            key = tuple(record.cell[name] for name in keys)
            found.setdefault(key, {})[record.cell["metric"]] = record
    return found


def print_footprints(records: Sequence[Record], console: Console) -> None:
    """Print one row per graph: load time, first answer, memory after it."""
    table = _table(*_KEYS[:4], "load ms", "first answer ms", "resident MB", title="Opening")
    for key, found in _by_key(records, _KEYS[:4], ("load", "first", "resident")).items():
        table.add_row(*key, *(f"{found[name].median:,.1f}" for name in ("load", "first", "resident")))
    console.print(table)


def _print_errors(records: Sequence[Record], console: Console) -> None:
    for error in dict.fromkeys(record.error for record in records if record.error is not None):
        console.print(f"not measured: {error}", style="red", markup=False, soft_wrap=True)


def _table(*columns: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    for column in columns:
        is_name = column in ("model", "tower", "precision", "engine")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=True)
    return table
