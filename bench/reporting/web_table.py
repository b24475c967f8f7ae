"""Table of web pages: bytes to fetch, loading, queries."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records.record import Record, require_one_environment
from bench.reporting.figure_table import figure_table

__all__ = ["web_table"]

_HEADER = (
    "model",
    "languages",
    "tokens",
    "model, MB",
    "fetched in all, MB",
    "largest file, MB",
    "ready, s",
    "of it opening, s",
    "query, ms",
    "lowest cosine",
)


def web_table(records: Sequence[Record]) -> str:
    """Render the figures of every page, medians of several openings."""
    require_one_environment(records)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        key = record.cell["model"], record.cell["languages"]
        found.setdefault(key, {})[record.cell["web"]] = record.median
    rows = [
        (
            f"`{model}`",
            languages,
            f"{one['tokens']:,.0f}",
            f"{one['model'] / 1e6:.1f}",
            f"{one['fetched'] / 1e6:.1f}",
            f"{one['largest file'] / 1e6:.1f}",
            f"{one['ready']:.1f}",
            f"{one['open'] / 1e3:.1f}",
            f"{one['query']:.0f}",
            f"{one['lowest cosine']:.6f}",
        )
        for (model, languages), one in found.items()
    ]
    return figure_table(_HEADER, rows)
