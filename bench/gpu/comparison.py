"""Compare a run's own cells: the product with PyTorch, tokens per second, and the limit of the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.records.record import Record

__all__ = [
    "PackedRatio",
    "PeerRatios",
    "comparisons_of",
    "floor_ms",
    "packed_ratios",
    "peaks_of",
    "shape_of",
    "speeds_of",
]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_PRODUCT, _PACKED = "babeltower", "babeltower, packed texts"
_EAGER, _COMPILED = "PyTorch", "PyTorch compiled"


@dataclass(frozen=True, slots=True)
class PeerRatios:
    """The product in one shape and metric, beside PyTorch in the same precision.

    Attributes:
        model: Name of the tower.
        shape: Rows, and tokens of each.
        metric: ``device``, ``call`` or ``wall``.
        precision: Precision of the products.
        ms: Median time of the product, in milliseconds.
        tokens_per_s: Tokens in a second, padding left out; ``None`` for images.
        eager: PyTorch's median time divided by the product's; ``None`` if it was not timed.
        compiled: The same for PyTorch compiled.
        limit: Share of the device's limit that the product reaches; ``None`` without peaks, and for times
            other than the device's own.
    """

    model: str
    shape: str
    metric: str
    precision: str
    ms: float
    tokens_per_s: float | None
    eager: float | None
    compiled: float | None
    limit: float | None


def comparisons_of(records: Sequence[Record]) -> Iterator[PeerRatios]:
    """Return a comparison per tower, shape and metric in which the product was timed, in order of time.

    The product's form is the first one of a shape; the others are in the tables of times.
    """
    peaks = peaks_of(records)
    cells: dict[tuple[str, str, str], dict[tuple[str, str], Record]] = {}
    for record in speeds_of(records):
        cell = record.cell
        place = cells.setdefault((cell["model"], shape_of(record), cell["metric"]), {})
        place[cell["by"], cell["precision"]] = record
    for (model, shape, metric), found in cells.items():
        ours = next((record for (by, _), record in found.items() if by == _PRODUCT), None)
        if ours is None:
            continue
        precision, seconds = ours.cell["precision"], ours.median / 1000
        peers = [found.get((name, precision)) for name in (_EAGER, _COMPILED)]
        eager, compiled = (peer.median / ours.median if peer else None for peer in peers)
        n_tokens = ours.settings.get("n_tokens")
        floor = floor_ms(ours, peaks) if metric == "device" else None
        yield PeerRatios(
            model,
            shape,
            metric,
            precision,
            ours.median,
            n_tokens / seconds if n_tokens else None,
            eager,
            compiled,
            floor / ours.median if floor else None,
        )


@dataclass(frozen=True, slots=True)
class PackedRatio:
    """The product's padded time divided by that of packed texts, in one shape, metric and precision."""

    model: str
    shape: str
    metric: str
    precision: str
    padded_ms: float
    packed_ms: float

    @property
    def ratio(self) -> float:
        """Above one where packing pays."""
        return self.padded_ms / self.packed_ms


def packed_ratios(records: Sequence[Record]) -> Iterator[PackedRatio]:
    """Return a ratio per tower, shape, metric and precision in which both forms were timed."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for record in speeds_of(records):
        cell = record.cell
        place = (cell["model"], shape_of(record), cell["metric"], cell["precision"])
        if cell["by"] in (_PRODUCT, _PACKED):
            found.setdefault(place, {})[cell["by"]] = record.median
    for place, ms in found.items():
        if len(ms) == 2:
            yield PackedRatio(*place, ms[_PRODUCT], ms[_PACKED])


def floor_ms(record: Record, peaks: Mapping[str, float]) -> float | None:
    """Return the least time of a cell: its products at the measured peak, or its weights at the bandwidth."""
    precision = record.cell["precision"]
    if precision not in peaks or "copy" not in peaks:
        return None
    products = record.settings["operations"] / (peaks[precision] * 1e9)
    weights = record.settings["product_weights"] * _BYTES[precision] / (peaks["copy"] * 1e9)
    return 1000 * float(max(products, weights))


def peaks_of(records: Sequence[Record]) -> dict[str, float]:
    """Return the median of each measured peak, by name."""
    peaks = [r for r in records if r.cell.get("suite") == "peaks" and r.error is None]
    return {r.cell["precision"]: r.median for r in peaks}


def speeds_of(records: Sequence[Record]) -> list[Record]:
    """Return the records of times."""
    return [r for r in records if r.cell.get("suite") == "gpu" and r.error is None]


def shape_of(record: Record) -> str:
    """Return a cell's shape as text."""
    cell = record.cell
    text = f"{cell['batch']}×{cell['tokens']}" if cell["tokens"] else cell["batch"]
    return f"{text} {cell['load']}" if cell.get("load") else text
