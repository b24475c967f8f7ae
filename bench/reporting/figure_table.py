"""Markdown table of figures: two columns of names, then numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["figure_table"]


def figure_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table; its first two columns name what the others, aligned on the right, measure."""
    lines = [header, ("---", "---", *["---:"] * (len(header) - 2)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
