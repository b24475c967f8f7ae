"""Files of the reports of ``bench/retrieval.py``, read and checked for contradictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.records.record import no_figure
from runtime.errors import BabeltowerError

__all__ = ["DIRECTIONS", "retrieval_records"]

DIRECTIONS = ("text_to_image", "image_to_text")
_SCHEMA = "babeltower-retrieval/1"


def retrieval_records(path: Path) -> dict[str, Mapping[str, Any]]:
    """Read the reports in a file or folder, by model, precision, engine and data set.

    Raises:
        BabeltowerError: a file is not JSON, or a report lacks values for a comparison or contradicts itself.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"), parse_constant=no_figure)
            if isinstance(data, dict) and data.get("schema") == _SCHEMA:
                model = data["model"]
                key = " ".join((model["name"], model["precision"], model["engine"], data["dataset"]))
                faults = list(_contradictions(data))
                found[key] = data
            else:
                faults = []
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BabeltowerError(f"{file} holds no benchmark records ({error!r}); measure again.") from error
        if faults:
            raise BabeltowerError(
                f"{file} contradicts itself: {'; '.join(faults[:3])} ({len(faults)} faults). It was changed "
                "after it was measured: measure again."
            )
    return found


def _contradictions(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield impossible figures, hits that do not add up, and limits exceeded by a passed gate."""
    if not report["languages"]:
        yield "it has no language"
    for language in report["languages"]:
        for direction in DIRECTIONS:
            where = f"{language['code']}, {direction}"
            side = language[direction]
            for k in {*side["reference"]["at"], "1"}:
                yield from _faults_of_recall(f"{where}, R@{k}", side, k, counts=report["protocol"] == "any")
    if report["verdict"]["passed"] and (limits := report.get("limits")):
        parts = {"images": report["images"], **{x["code"]: x["texts"] for x in report["languages"]}}
        for name, found in parts.items():
            if not found["cosine_min"] >= limits["min_cosine"]:
                yield f"{name} passed with a cosine of {found['cosine_min']}, under {limits['min_cosine']}"


def _faults_of_recall(where: str, side: Mapping[str, Any], k: str, *, counts: bool) -> Iterator[str]:
    """Yield faults of one recall; if hits are whole queries (``counts``), turned hits must add up."""
    shares = [float(side[name]["at"][k]) for name in ("reference", "exported")]
    n_queries = int(side["reference"]["n_queries"])
    if not all(0 <= share <= 1 for share in shares):
        yield f"{where} is {shares}, expected shares between 0 and 1"
        return
    if n_queries < 1:
        yield f"{where} was measured on {n_queries} queries"
        return
    turned = [bool(hit["reference_hits"]) for hit in side["turned"] if str(hit["k"]) == k]
    expected = shares[0] * n_queries - sum(turned) + turned.count(False)
    if counts and abs(shares[1] * n_queries - expected) > 0.5:
        yield f"{where} has {shares[1] * n_queries:.0f} hits of {n_queries}, where {expected:.0f} add up"
