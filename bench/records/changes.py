"""Changes between two runs of a benchmark: cells of speed and size, and recall per language.

Significance is decided over all changes at once: among several hundred unchanged cells, some exceed the
interval of a single cell by chance.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bench.records.record import Record
from bench.records.retrieval import DIRECTIONS
from bench.records.statistics import (
    Interval,
    bootstrap_ratio_interval,
    chance_of_binomial,
    chance_of_ratio,
    discoveries,
)
from runtime.errors import BabeltowerError

__all__ = [
    "Change",
    "Outcome",
    "changes_of_records",
    "changes_of_retrieval",
    "judged",
    "require_comparable",
]

_LOWER_IS_BETTER = frozenset({"ms", "s", "MB", "GB", "bytes"})
_HIGHER_IS_BETTER = frozenset({"rows/s", "rows/core-second", "requests/s", "GOP/s", "GB/s"})


class Outcome(str, Enum):
    """Outcome of one cell. ``FAILED``: it has an error now, or passed its gate before and not now."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    FAILED = "failed"
    MENDED = "mended"
    MISSING = "missing"
    NEW = "new"


@dataclass(frozen=True, slots=True)
class Change:
    """Change of one cell, or of one language's recall in one direction at one k, between two runs.

    Attributes:
        old: Median of the samples, or recall in percent; ``None`` if nothing was measured.
        worse_by: Speed and size: share of the old value; recall: points. Negative if it is better.
        interval: 95% interval of new ÷ old, for this cell alone; ``None`` for recall.
        chance: Probability of so large a change if nothing changed.
    """

    name: str
    unit: str
    old: float | None
    new: float | None
    worse_by: float
    interval: Interval | None
    chance: float
    outcome: Outcome
    note: str = ""


def changes_of_records(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Pair the cells of two runs by name; outcomes are those of single cells, see ``judged``.

    Raises:
        BabeltowerError: a run has a cell twice or an unknown unit, or a cell has different units.
    """
    before, after = _by_cell(old), _by_cell(new)
    found = [_change(name, before.get(name), after.get(name)) for name in before]
    return found + [_change(name, None, record) for name, record in after.items() if name not in before]


def changes_of_retrieval(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Compare two reports of ``bench/retrieval.py`` on the same model and captions, query by query.

    Both name the queries that their exported model answers differently from PyTorch; a query that only one
    of them names changed between them.

    Raises:
        BabeltowerError: their embedding spaces, data sets or protocols differ.
    """
    for what in ("dataset", "protocol", "n_images", "n_texts"):
        _require_equal(what, old[what], new[what])
    _require_equal("language_map", old.get("language_map"), new.get("language_map"))
    for what in ("name", "fingerprint"):
        _require_equal(f"the model's {what}", old["model"][what], new["model"][what])
    label = f"{new['model']['name']} {new['model']['precision']} on {new['model']['engine']}"
    after = {language["code"]: language for language in new["languages"]}
    found = [_verdict_change(label, old["verdict"], new["verdict"])]
    for language in old["languages"]:
        code = language["code"]
        if code not in after:
            found.append(_lacking(f"{label}, {code}", "%", Outcome.MISSING))
            continue
        for direction in DIRECTIONS:
            sides = language[direction], after[code][direction]
            found += _recall_changes(f"{label}, {code}, {direction}", *sides)
    return found


def judged(changes: Sequence[Change], *, tolerance: float) -> list[Change]:
    """Decide over all cells which changes are significant; the worst first.

    At most 5% of the significant changes are expected to be chance (Benjamini and Hochberg). A change of
    speed or size must also exceed the tolerance, a share; a change of recall need not.
    """
    open_ = [i for i, change in enumerate(changes) if change.outcome in (Outcome.WORSE, Outcome.BETTER)]
    chances = [changes[i].chance for i in open_]
    believed = {i for i, yes in zip(open_, discoveries(chances), strict=True) if yes}
    found = list(changes)
    for i in open_:
        small = changes[i].interval is not None and abs(changes[i].worse_by) <= tolerance
        if i not in believed or small:
            found[i] = dataclasses.replace(changes[i], outcome=Outcome.SAME)
    return sorted(found, key=lambda change: (_URGENCY.index(change.outcome), -change.worse_by))


_URGENCY = (
    Outcome.FAILED,
    Outcome.WORSE,
    Outcome.MISSING,
    Outcome.BETTER,
    Outcome.MENDED,
    Outcome.NEW,
    Outcome.SAME,
)


def require_comparable(old: Sequence[Record], new: Sequence[Record]) -> None:
    """Refuse runs of different machines or packages; commits of the source may differ.

    Raises:
        BabeltowerError: machine or versions differ, within a run or between the two.
    """
    records = [record for record in (*old, *new) if record.error is None]
    for record in records[1:]:
        for what in ("machine", "versions"):
            first, other = getattr(records[0], what), getattr(record, what)
            if first != other:
                differing = sorted(k for k in {*first, *other} if first.get(k) != other.get(k))
                raise BabeltowerError(
                    f"The runs are of different {'machines' if what == 'machine' else 'packages'}: "
                    f"{', '.join(f'{k} {first.get(k)} and {other.get(k)}' for k in differing)}. Measure both "
                    "on one, or pass --different-environments to compare them all the same."
                )


def _by_cell(records: Sequence[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        name = _name(record.cell)
        if name in found:
            raise BabeltowerError(f"A run holds the cell {name} twice; compare single runs.")
        if record.unit not in _LOWER_IS_BETTER | _HIGHER_IS_BETTER:
            raise BabeltowerError(f"The unit {record.unit} of {name} is unknown; better or worse?")
        found[name] = record
    return found


def _name(cell: Mapping[str, str]) -> str:
    """Return a cell in words; numbers with their unit."""
    return " ".join(f"{key} {value}" if value[0].isdigit() else value for key, value in cell.items() if value)


def _change(name: str, old: Record | None, new: Record | None) -> Change:
    if old is None or new is None:
        record = old or new
        assert record is not None
        return _lacking(name, record.unit, Outcome.NEW if old is None else Outcome.MISSING)
    if old.error is not None or new.error is not None:
        outcome = Outcome.FAILED if old.error is None else Outcome.MENDED
        if old.error is not None and new.error is not None:
            outcome = Outcome.SAME
        return dataclasses.replace(_lacking(name, new.unit, outcome), note=new.error or "")
    _require_equal(f"the unit of {name}", old.unit, new.unit)
    interval = bootstrap_ratio_interval(
        old.by_process, new.by_process
    )  # refuses samples that are not positive
    medians = [statistics.median(map(statistics.median, r.by_process)) for r in (old, new)]
    ratio = medians[1] / medians[0]
    worse_by = ratio - 1 if new.unit in _LOWER_IS_BETTER else 1 / ratio - 1
    return Change(
        name=name,
        unit=new.unit,
        old=medians[0],
        new=medians[1],
        worse_by=worse_by,
        interval=interval,
        chance=chance_of_ratio(old.by_process, new.by_process),
        outcome=_sign(worse_by),
    )


def _recall_changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    n_queries = old["reference"]["n_queries"]
    _require_equal(f"the number of queries of {name}", n_queries, new["reference"]["n_queries"])
    for k in old["reference"]["at"]:
        _require_equal(f"R@{k} of {name}, measured", True, k in new["reference"]["at"])
        turned = [
            {t["query"]: t["reference_hits"] for t in side["turned"] if str(t["k"]) == k}
            for side in (old, new)
        ]
        changed = {
            q: hits for q, hits in (turned[0] | turned[1]).items() if (q in turned[0]) != (q in turned[1])
        }
        n_lost = sum(hits == (q in turned[1]) for q, hits in changed.items())
        recalls = [100 * side["exported"]["at"][k] for side in (old, new)]
        yield Change(
            name=f"{name}, R@{k}",
            unit="%",
            old=recalls[0],
            new=recalls[1],
            worse_by=recalls[0] - recalls[1],
            interval=None,
            chance=chance_of_binomial(n_lost, len(changed) - n_lost),
            outcome=_sign(recalls[0] - recalls[1]),
            note=f"{n_lost} lost, {len(changed) - n_lost} gained of {n_queries}",
        )


def _verdict_change(label: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    passed = old["passed"], new["passed"]
    outcome = Outcome.SAME
    if passed[0] != passed[1]:
        outcome = Outcome.FAILED if passed[0] else Outcome.MENDED
    change = _lacking(f"{label}, verdict", "", outcome)
    return dataclasses.replace(change, note="; ".join(new["failures"][:1]))


def _lacking(name: str, unit: str, outcome: Outcome) -> Change:
    return Change(name, unit, None, None, 0.0, None, 1.0, outcome)


def _sign(worse_by: float) -> Outcome:
    if worse_by == 0:
        return Outcome.SAME
    return Outcome.WORSE if worse_by > 0 else Outcome.BETTER


def _require_equal(what: str, old: Any, new: Any) -> None:
    if old != new:
        raise BabeltowerError(
            f"These runs cannot be compared: {what} is {old} in one and {new} in the other."
        )
