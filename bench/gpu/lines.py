"""JSON lines of a run, written as they come: a run that is cut off keeps what it measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LINES", "QUIET", "RECORD", "Bench", "read_lines", "remove_leftovers"]

LINES = "gpu.jsonl"
"""File of the lines, in the folder of the results."""

RECORD = "gpu.json"
"""File of the records, in the folder of the results."""

_MEMORY = Path("/dev/shm")
_IN_MEMORY = "babeltower-gpu"
_GRAPHS, _SKELETONS = "graphs", "skeletons"
_LEFTOVERS = (_GRAPHS, _SKELETONS, "samples", "smoke", "vectors")
_ROOM_BYTES = 50e9

QUIET = "quiet"
"""File that says that no other step is running, so that times can be taken."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a step reads and writes, and how much it does.

    Attributes:
        bundle: Folder of the bundle.
        out: Folder of the results.
        work: Folder for large temporary files.
        dry: Run the same code on the processor, with tiny towers.
        ends_at: Time (``time.time()``) by which the step has to end.
    """

    bundle: Path
    out: Path
    work: Path
    dry: bool
    ends_at: float

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.ends_at - time.time()

    def skeleton(self, slug: str) -> Path:
        """Return the file of a tower's graph without weights."""
        return self.work / _SKELETONS / f"{slug}.onnx"

    @property
    def graphs(self) -> Path:
        """Folder for full-size graphs, some 30 GB: in memory where there is room, which is faster."""
        in_memory = _MEMORY / _IN_MEMORY
        if in_memory.is_dir() or (_MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES):
            in_memory.mkdir(exist_ok=True)
            return in_memory
        return self.work / _GRAPHS

    def emit(self, **line: Any) -> None:
        """Append one line."""
        text = json.dumps({"at": round(time.time(), 3), **line}, ensure_ascii=False) + "\n"
        with (self.out / LINES).open("ab", buffering=0) as stream:  # one write: several processes append
            stream.write(text.encode())


def remove_leftovers(work: Path) -> None:
    """Remove an earlier run's samples, vectors and graphs, which may be another bundle's or half-written."""
    for folder in (*(work / name for name in _LEFTOVERS), _MEMORY / _IN_MEMORY):
        if folder.is_dir():
            shutil.rmtree(folder)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a run; a last line that was cut off is left out."""
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue
