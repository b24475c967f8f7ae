"""Table of a model with its whole vocabulary, and with that of a few languages."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records.record import Record, require_one_environment
from bench.reporting.figure_table import figure_table

__all__ = ["pruned_table"]

_HEADER = (
    "model",
    "languages",
    "tokens",
    "graph, MB",
    "tokenizer, MB",
    "resident, MB",
    "of it without a model",
    "captions with the whole model's vector",
)


def pruned_table(records: Sequence[Record]) -> str:
    """Render one row a vocabulary."""
    require_one_environment(records)
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record.cell["model"], record.cell["languages"]), {})[record.cell["pruned"]] = record
    rows = [
        (
            f"`{model}`",
            languages.replace(",", ", "),
            f"{of['graph on disk'].settings['n_tokens']:,}",
            f"{of['graph on disk'].median:.1f}",
            f"{of['tokenizer on disk'].median:.1f}",
            f"{of['resident'].median:.0f}",
            f"{of['resident without a model'].median:.0f}",
            _equal(of.get("equal vectors")),
        )
        for (model, languages), of in found.items()
    ]
    return figure_table(_HEADER, rows)


def _equal(record: Record | None) -> str:
    return "–" if record is None else f"{record.median:g}% of {record.settings['captions']:,}"
