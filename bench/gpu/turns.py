"""Files by which a tower's processes and the one that started them take turns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.lines import Bench
from runtime.storage import replace_text

__all__ = ["POLL_S", "Turn"]

POLL_S = 0.05
"""Seconds between two looks at a file."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Files by which a tower's processes say what is done: graphs written, all ready, time to begin.

    The last one holds the time until which the tower may be timed.
    """

    graphs: Path
    ready: Path
    go: Path

    @classmethod
    def of(cls, bench: Bench, slug: str) -> Turn:
        """Return a tower's files."""
        return cls(*(bench.work / f"{slug}.{name}" for name in ("graphs", "ready", "go")))

    def begin(self, until: float) -> None:
        """Tell a prepared process to take its times until ``until`` (``time.time()``)."""
        replace_text(self.go, f"{until}")

    def wait_to_begin(self) -> float:
        """Wait until told to begin, and return the time until which times may be taken."""
        while not self.go.exists():
            time.sleep(POLL_S)
        return float(self.go.read_text(encoding="ascii"))
