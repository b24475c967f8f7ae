"""Dot chart of the recall of every language, laid out for SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.retrieval.comparison import Direction, LanguageFigures

__all__ = ["DotColumn", "DotRow", "dot_columns"]

ROW_HEIGHT_PX = 18
_HEAD_PX = 26
_FOOT_PX = 12
_LABEL_CHARACTERS = 23


@dataclass(frozen=True, slots=True)
class DotRow:
    """Row of one language; recalls are percentages by k, ``y`` is the line's centre in pixels."""

    label: str
    code: str
    y: float
    reference: Mapping[int, float]
    exported: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class DotColumn:
    """Column of rows that share an axis from 0 to 100%; lengths in pixels."""

    rows: tuple[DotRow, ...]
    height_px: int
    head_px: int = _HEAD_PX


def dot_columns(
    figures: Sequence[LanguageFigures],
    direction: Direction = Direction.TEXT_TO_IMAGE,
    *,
    n_columns: int = 2,
) -> tuple[DotColumn, ...]:
    """Lay languages out in the given order, down one column and then the next."""
    per_column = -(-len(figures) // n_columns)
    starts = range(0, len(figures), per_column)
    return tuple(_column(figures[start : start + per_column], direction) for start in starts)


def _label(name: str) -> str:
    """Shorten a language's English name to fit beside its line."""
    short = name.replace(" characters)", ")").replace(" script)", ")")
    return short if len(short) <= _LABEL_CHARACTERS else f"{short[: _LABEL_CHARACTERS - 1].rstrip()}…"


def _column(figures: Sequence[LanguageFigures], direction: Direction) -> DotColumn:
    rows = tuple(
        DotRow(
            label=_label(entry.name),
            code=entry.code,
            y=_HEAD_PX + (place + 0.5) * ROW_HEIGHT_PX,
            reference={k: 100 * value for k, value in entry.comparison(direction).reference.at.items()},
            exported={k: 100 * value for k, value in entry.comparison(direction).exported.at.items()},
        )
        for place, entry in enumerate(figures)
    )
    return DotColumn(rows, _HEAD_PX + len(rows) * ROW_HEIGHT_PX + _FOOT_PX)
