"""How far a result is from the best that this machine can do.

A run takes at least as long as its products at the machine's measured peaks, and at least as long as its
bytes at the measured bandwidth of a working set of that size; the longer of the two is the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.graph_costs import GraphCost
from bench.records import Record
from runtime.errors import BabeltowerError

__all__ = ["Peaks", "cost_settings", "limit_ms", "peaks_from_records", "share_of_limit"]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Medians of one machine's peaks.

    Attributes:
        products: GOP/s by precision.
        reads: GB/s of reading, by working set in bytes, ascending.
        threads: That the peaks were measured with.
    """

    products: Mapping[str, float]
    reads: Mapping[int, float]
    threads: int

    def read_rate(self, n_bytes: int) -> float:
        """GB/s of the smallest measured working set that holds so many bytes, or of the largest."""
        fitting = [rate for size, rate in self.reads.items() if size >= n_bytes]
        return fitting[0] if fitting else list(self.reads.values())[-1]


def peaks_from_records(records: Iterable[Record]) -> Peaks:
    """Those of the processor among the records.

    Raises:
        BabeltowerError: there are none, or of several numbers of threads.
    """
    products, reads, threads = {}, {}, set()
    for record in records:
        cell = record.cell
        if cell.get("suite") != "peaks" or record.error is not None or cell["engine"] == "cuda":
            continue
        threads.add(int(record.settings["threads"]))
        name = cell["precision"]
        if name.startswith("read "):
            reads[int(name.split()[1]) << 20] = record.median
        elif name != "copy":
            products[name] = record.median
    if len(threads) != 1 or not products or not reads:
        raise BabeltowerError(
            f"There are no peaks of one number of threads among the records: threads {sorted(threads)}, "
            f"products {sorted(products)}, {len(reads)} working sets. Measure them with bench/peaks.py."
        )
    return Peaks(products, dict(sorted(reads.items())), threads.pop())


def cost_settings(cost: GraphCost) -> dict[str, Any]:
    """What a record keeps of a run's cost, to be held against the peaks."""
    return {
        "operations_per_run": cost.n_operations,
        "operations_by_precision": {p.value: n for p, n in cost.operations.items()},
        "bytes_per_run": cost.n_bytes,
    }


def limit_ms(settings: Mapping[str, Any], peaks: Peaks) -> float | None:
    """Least time of a run in milliseconds; ``None`` where a precision's peak is not known."""
    operations: Mapping[str, int] = settings["operations_by_precision"]
    if operations.keys() - peaks.products.keys():
        return None
    computing = sum(n / peaks.products[precision] for precision, n in operations.items()) / 1e6
    n_bytes: int = settings["bytes_per_run"]
    moving = n_bytes / peaks.read_rate(n_bytes) / 1e6
    return max(computing, moving)


def share_of_limit(record: Record, peaks: Peaks) -> float | None:
    """The limit's time as a share of the median run's: 1 is the best possible.

    ``None`` where there is nothing to compare: an error, no cost, other threads, an unknown peak.
    """
    settings = record.settings
    if record.error is not None or "bytes_per_run" not in settings:
        return None
    if settings["threads"] != peaks.threads or record.unit != "ms":
        return None
    limit = limit_ms(settings, peaks)
    return None if limit is None else limit / record.median
