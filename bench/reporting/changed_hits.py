"""Searches that PyTorch and the exported model answer differently, with their pictures, for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.retrieval_report import Evaluation
from bench.accuracy.searches import FoundPicture, TurnedSearch, turned_searches
from bench.reporting.retrieval_page import pictures_of
from runtime.preprocessing.languages import english_name

__all__ = ["SCHEMA", "turned_path", "write_turned"]

SCHEMA = "babeltower-turned/1"
"""``model``, ``precision``, ``engine`` and ``searches``. A search has its ``text``, the language's ``code``
and ``name``, the right picture's ``reference_rank`` and ``exported_rank`` from 1, and both top fives, each
answer with ``picture`` (a data URI), ``key``, ``score`` and ``is_right``."""


def turned_path(record: Path) -> Path:
    """Return the path of the searches beside a record of retrieval."""
    return record.with_name(f"{record.stem}.turned.json")


def write_turned(record: Path, evaluation: Evaluation) -> Path | None:
    """Write the turned searches beyond ties, clearest first; without any, return ``None``."""
    path, report = turned_path(record), evaluation.report
    turned = [s for s in turned_searches(evaluation) if s.hit.margin > report.limits.tie_margin]
    if not turned:
        path.unlink(missing_ok=True)
        return None
    picture = pictures_of(evaluation)
    data = {
        "schema": SCHEMA,
        "model": report.model.name,
        "precision": report.model.precision.value,
        "engine": report.model.engine.value,
        "searches": [_as_json(search, picture) for search in turned],
    }
    path.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _as_json(turned: TurnedSearch, picture: Callable[[int], str]) -> dict[str, Any]:
    search = turned.search
    return {
        "text": search.text,
        "code": search.code,
        "name": english_name(search.language),
        "reference_rank": turned.reference_rank,
        "exported_rank": turned.exported_rank,
        "reference": _answers(search.reference, picture),
        "exported": _answers(search.exported, picture),
    }


def _answers(found: Sequence[FoundPicture], picture: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {"picture": picture(a.image), "key": a.key, "score": a.score, "is_right": a.is_right} for a in found
    ]
