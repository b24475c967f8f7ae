"""Table of models in immich's folder, and the targets that they are held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.records.record import Record, paired, require_one_environment
from bench.reporting.figure_table import figure_table
from runtime.manifest import Precision

__all__ = ["immich_table", "missed_targets", "service_table"]

_HEADER = (
    "model",
    "precision",
    "MB on disk",
    "resident MB",
    "load, CPU s",
    "first answer, CPU s",
    "query of 5 tokens, CPU ms",
    "plain FP32 export, CPU ms",
    "query ÷ plain",
    "R@1 lost",
)

_SERVICE_HEADER = (
    "model",
    "precision",
    "MB before the first request",
    "with the text tower",
    "given back",
    "first answer, s (CPU s)",
    "after idle, s (CPU s)",
    "query, ms (CPU ms)",
)

_HELD_TO = ("nllb-clip-base-siglip", Precision.INT8.value)
_MOST_RESIDENT_MB, _LATEST_FIRST_S, _LARGEST_SHARE = 1_000, 1.5, 0.1


def immich_table(records: Sequence[Record]) -> str:
    """Render the medians of every model and precision, times of the processor; recall lost is a sample's.

    The records have times by the clock too, which say little of a machine that has other work.
    """
    require_one_environment(records)
    lost = {
        record.cell["precision"]: f"{max(record.samples):.2f}"
        for record in records
        if record.cell["immich"] == "recall lost"
    }
    rows = [
        (
            f"`{model}`",
            precision.upper(),
            f"{found['disk'].median:,.0f}",
            f"{found['resident'].median:,.0f}",
            f"{found['load cpu'].median:.2f}",
            f"{found['first cpu'].median:.2f}",
            f"{found['query cpu'].median:.1f}",
            f"{found['plain cpu'].median:.0f}",
            f"{_share(found):.3f}",
            lost.get(precision, "–"),
        )
        for (model, precision), found in _by_model(records).items()
    ]
    return figure_table(_HEADER, rows)


def service_table(records: Sequence[Record]) -> str:
    """Render the medians of ``babeltower serve`` in place of the service."""
    require_one_environment(records)
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        key = record.cell["model"], record.cell["precision"]
        found.setdefault(key, {})[record.cell["immich service"]] = record
    rows = [
        (
            f"`{model}`",
            precision.upper(),
            *(f"{of[figure].median:,.0f}" for figure in ("idle", "text", "unloaded")),
            *(
                f"{of[f'{which} wall'].median:.2f} ({of[f'{which} cpu'].median:.2f})"
                for which in ("first", "again")
            ),
            f"{of['query wall'].median:.0f} ({of['query cpu'].median:.0f})",
        )
        for (model, precision), of in found.items()
    ]
    return figure_table(_SERVICE_HEADER, rows)


def missed_targets(records: Sequence[Record]) -> list[str]:
    """List the targets that NLLB-CLIP base in INT8 misses; empty too if it was not measured."""
    found = _by_model(records).get(_HELD_TO)
    return [] if found is None else list(_missed(found))


def _missed(found: dict[str, Record]) -> Iterator[str]:
    resident, first, share = found["resident"].median, found["first cpu"].median, _share(found)
    if resident > _MOST_RESIDENT_MB:
        yield f"{resident:,.0f} MB resident; the target is {_MOST_RESIDENT_MB:,}"
    if first > _LATEST_FIRST_S:
        yield f"the first answer takes {first:.2f} CPU seconds; the target is {_LATEST_FIRST_S}"
    if share > _LARGEST_SHARE:
        yield f"a query takes {share:.3f} of a plain FP32 export's CPU time; the target is {_LARGEST_SHARE}"


def _share(found: dict[str, Record]) -> float:
    """CPU time of a query as a share of the plain export's, paired by turn."""
    return paired(found["query cpu"], found["plain cpu"])


def _by_model(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if record.cell["immich"] != "recall lost":
            key = record.cell["model"], record.cell["precision"]
            found.setdefault(key, {})[record.cell["immich"]] = record
    return found
