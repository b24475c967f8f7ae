"""Files by which a tower's processes and the one that started them take turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.gpu.lines import Bench

__all__ = ["POLL_S", "Turn"]

POLL_S = 0.05
"""Seconds between two looks at a file."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Files by which a tower's processes say what is done: graphs written, all ready, time to begin."""

    graphs: Path
    ready: Path
    go: Path

    @classmethod
    def of(cls, bench: Bench, slug: str) -> Turn:
        """Return a tower's files."""
        return cls(*(bench.work / f"{slug}.{name}" for name in ("graphs", "ready", "go")))
