"""Roofline of the machine: the share of its limit that a result reaches.

A run takes at least as long as its products at the machine's measured peaks, and at least as long as its
bytes at the measured bandwidth of a working set of that size; the longer of the two is the limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.records.record import Record
from bench.timing.graph_costs import GraphCost
from runtime.errors import BabeltowerError

__all__ = ["Peaks", "cost_settings", "limit_ms", "peaks_from_records", "share_of_limit"]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Medians of one machine's peaks.

    Attributes:
        products: GOP/s by precision.
        reads: GB/s of reading, by working set in bytes, ascending.
        threads: Threads that the peaks were measured with; ``None`` for a GPU.
    """

    products: Mapping[str, float]
    reads: Mapping[int, float]
    threads: int | None

    def read_rate(self, n_bytes: int) -> float:
        """Return GB/s of the smallest measured working set that holds so many bytes, or of the largest."""
        fitting = [rate for size, rate in self.reads.items() if size >= n_bytes]
        return fitting[0] if fitting else list(self.reads.values())[-1]


def peaks_from_records(records: Iterable[Record], *, gpu: bool = False) -> Peaks:
    """Return the processor's peaks from the records, or the GPU's.

    Raises:
        BabeltowerError: there are no peaks, or they are of several numbers of threads.
    """
    products: dict[str, float] = {}
    reads: dict[int, float] = {}
    threads: set[int | None] = set()
    for record in records:
        cell = record.cell
        of_gpu = cell["engine"] == "cuda" if cell.get("suite") == "peaks" else None
        if of_gpu is not gpu or record.error is not None:
            continue
        threads.add(record.settings.get("threads"))
        name = cell["precision"]
        if name.startswith("read "):
            reads[int(name.split()[1]) << 20] = record.median
        elif name != "copy":
            products[name] = record.median
    if len(threads) != 1 or not products or not reads:
        raise BabeltowerError(
            f"There are no peaks of one number of threads among the records: threads {list(threads)}, "
            f"products {sorted(products)}, {len(reads)} working sets. Measure them with bench/peaks.py."
        )
    return Peaks(products, dict(sorted(reads.items())), threads.pop())


def cost_settings(cost: GraphCost) -> dict[str, Any]:
    """Return a run's cost as settings of its record, to be compared with the peaks."""
    return {
        "operations_per_run": cost.n_operations,
        "operations_by_precision": {p.value: n for p, n in cost.operations.items()},
        "bytes_per_run": cost.n_bytes,
    }


def limit_ms(settings: Mapping[str, Any], peaks: Peaks) -> float | None:
    """Return the least time of a run in milliseconds; ``None`` if a precision's peak is unknown."""
    operations: Mapping[str, int] = settings["operations_by_precision"]
    if operations.keys() - peaks.products.keys():
        return None
    computing = sum(n / peaks.products[precision] for precision, n in operations.items()) / 1e6
    n_bytes: int = settings["bytes_per_run"]
    moving = n_bytes / peaks.read_rate(n_bytes) / 1e6
    return max(computing, moving)


def share_of_limit(record: Record, peaks: Peaks) -> float | None:
    """Return the limit's time ÷ the median run's: 1 is the best possible.

    For rows per second on several cores, the work of a core in its CPU time is compared with the peaks of one
    thread. ``None`` if nothing can be compared: an error, no cost, other threads, an unknown peak, a GPU's
    record against the processor's peaks.
    """
    settings = record.settings
    if record.error is not None or "bytes_per_run" not in settings:
        return None
    if (record.cell["engine"] == "tensorrt") is not (peaks.threads is None):
        return None
    limit = limit_ms(settings, peaks)
    if limit is None:
        return None
    run_ms: float
    if record.unit == "rows/s" and peaks.threads == 1:
        run_ms = 1e3 * int(record.cell["batch"]) / statistics.median(settings["rows_per_core_s"])
    elif record.unit == "ms" and peaks.threads in (None, settings["threads"]):
        run_ms = record.median
    else:
        return None
    return limit / run_ms
