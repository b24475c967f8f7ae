"""Verdicts on babeltower against its peers: ratios within the turns, from the records of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from bench.records.record import Record, interval, ratios_by_turn, require_one_environment
from runtime.errors import BabeltowerError

__all__ = [
    "ANY",
    "PeerVerdict",
    "closest_of_verdicts",
    "error_table",
    "peer_table",
    "verdict_table",
    "verdicts_of",
]

ANY = "any"
"""Stands for a precision: the best of all precisions that pass the gate."""

_PLACE = ("family", "model", "tower", "tokens", "batch")


@dataclass(frozen=True, slots=True)
class PeerVerdict:
    """babeltower's fastest form beside one peer, in one place.

    Attributes:
        place: Family, model, tower, tokens, batch.
        precision: Precision of both, or ``ANY``.
        ratio: Time of the peer ÷ time of babeltower: median of the ratios within the turns.
        low, high: Interval of the ratio, 95% if there are 6 turns or more.
    """

    place: tuple[str, ...]
    precision: str
    own: Record
    peer: Record
    ratio: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """``ahead`` or ``behind`` if the interval shows it; else ``even``, within the noise."""
        if self.low >= 1.0:
            return "ahead"
        return "behind" if self.high < 1.0 else "even"


def verdicts_of(records: Sequence[Record]) -> list[PeerVerdict]:
    """Return each peer's verdict at equal precision, then the best peer's at any precision.

    Raises:
        BabeltowerError: the records are of several environments, or a place has no time of babeltower.
    """
    require_one_environment(records)
    found = []
    for place in dict.fromkeys(_place(record) for record in records):
        here = [record for record in records if _place(record) == place and record.error is None]
        own = [record for record in here if record.cell["by"] == "babeltower"]
        peers = [record for record in here if record.cell["by"] != "babeltower"]
        if not own:
            raise BabeltowerError(f"babeltower was not measured for {' '.join(place)}; measure again.")
        for peer in peers:
            equal = [record for record in own if record.cell["precision"] == peer.cell["precision"]]
            if equal:
                found.append(_verdict(place, peer.cell["precision"], _fastest(equal), peer))
        if peers:
            found.append(_verdict(place, ANY, _fastest(own), _fastest(peers)))
    return found


def closest_of_verdicts(verdicts: Iterable[PeerVerdict]) -> list[PeerVerdict]:
    """Return the verdict on the best peer of each place and precision."""
    best: dict[tuple[tuple[str, ...], str], PeerVerdict] = {}
    for verdict in verdicts:
        key = verdict.place, verdict.precision
        if key not in best or verdict.ratio < best[key].ratio:
            best[key] = verdict
    return list(best.values())


def verdict_table(verdicts: Iterable[PeerVerdict]) -> Table:
    """Return a table with the best peer of each place and precision."""
    return _table(
        closest_of_verdicts(verdicts), "babeltower and the best peer; ms of CPU time a run, one thread"
    )


def peer_table(verdicts: Iterable[PeerVerdict]) -> Table:
    """Return a table with every peer."""
    return _table(verdicts, "babeltower and every peer; ms of CPU time a run, one thread")


def error_table(records: Iterable[Record]) -> Table:
    """Return a table of errors; batches with the same error share a row."""
    table = Table("family", "tower", "from", "peer", "error", title="Models that a peer cannot run")
    batches: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        if record.error is not None:
            cell = record.cell
            key = (cell["family"], cell["tower"], cell["tokens"], _name(record), record.error)
            batches.setdefault(key, []).append(cell["batch"])
    for (family, tower, tokens, name, error), _ in batches.items():
        table.add_row(family, tower, tokens, name, error[:240])
    return table


def _table(verdicts: Iterable[PeerVerdict], title: str) -> Table:
    columns = ("family", "tower", "from", "batch", "precision", "babeltower", "ms", "peer", "ms")
    table = Table(*columns, "×", "95%", "verdict", title=title)
    for v in verdicts:
        family, _, tower, tokens, batch = v.place
        table.add_row(
            *(family, tower, tokens or "pixels", batch, v.precision),
            *(f"{v.own.cell['engine']} {v.own.cell['precision']}", f"{v.own.median:.3g}"),
            *(_name(v.peer), f"{v.peer.median:.3g}", f"{v.ratio:.2f}", f"{v.low:.2f}–{v.high:.2f}"),
            {"behind": "[red]behind[/red]"}.get(v.word, v.word),
        )
    return table


def _name(record: Record) -> str:
    by, precision = record.cell["by"], record.cell["precision"]
    if by == "babeltower":
        return f"{by} {record.cell['engine']} {precision}"
    return by if by.endswith(precision) else f"{by} ({precision})"


def _place(record: Record) -> tuple[str, ...]:
    return tuple(record.cell[key] for key in _PLACE)


def _fastest(records: Sequence[Record]) -> Record:
    return min(records, key=lambda record: record.median)


def _verdict(place: tuple[str, ...], precision: str, own: Record, peer: Record) -> PeerVerdict:
    ratios = ratios_by_turn(peer, own)
    return PeerVerdict(place, precision, own, peer, median(ratios), *interval(ratios))
