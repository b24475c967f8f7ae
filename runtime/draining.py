"""Draining of a server: its Python models answer what runs, and refuse what comes later.

Triton keeps on accepting requests while it stops, and fails the calls of front ends to their towers. Whoever
stops a server drains it first, by files in a folder that ``BABELTOWER_DRAIN`` names to the server:

    stop-front-ends, stop-towers   models of that kind take no more requests
    PID.front-end, PID.tower       a Python model that runs; removed when it is unloaded
    PID.drained                    one that has answered all

It needs the standard library alone, since it also runs by itself in a container that is to be stopped:

    python3 draining.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

__all__ = ["DRAIN_VARIABLE", "DrainedKind", "drained", "drained_processes", "main"]

DRAIN_VARIABLE = "BABELTOWER_DRAIN"
_LOOK_S = 0.05


class DrainedKind(str, Enum):
    """Kinds of models, in the order in which they are drained: front ends call towers."""

    FRONT_END = "front-end"
    TOWER = "tower"

    def stop_file(self, folder: Path) -> Path:
        """Return the file that asks models of this kind to take no more requests."""
        return folder / f"stop-{self.value}s"

    def is_asked_to_stop(self, mark: Path) -> bool:
        """Check whether the model with a mark shall stop: older requests were for a former server."""
        try:
            return self.stop_file(mark.parent).stat().st_mtime_ns >= mark.stat().st_mtime_ns
        except OSError:  # another error would end the thread that asks
            return False


def drained(folder: Path, timeout_s: float) -> bool:
    """Drain the models of a server, front ends first; return false if some did not end in time."""
    give_up_at = time.monotonic() + timeout_s
    folder.mkdir(parents=True, exist_ok=True)
    for kind in DrainedKind:
        kind.stop_file(folder).touch()
        while any(_runs(path) for path in folder.glob(f"*.{kind.value}")):
            if time.monotonic() > give_up_at:
                return False
            time.sleep(_LOOK_S)
    return True


def drained_processes(folder: Path) -> set[int]:
    """Return the process ids of models that have answered all."""
    return {int(path.stem) for path in folder.glob("*.drained")}


def _runs(mark: Path) -> bool:
    """Check whether the process of a mark is a Python model; the number may be another's by now."""
    try:
        return b"triton_python_backend_stub" in Path(f"/proc/{mark.stem}/cmdline").read_bytes()
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Drain the server whose environment names the folder; return the exit code."""
    parser = argparse.ArgumentParser(description="Let a server answer what runs, and refuse the rest.")
    parser.add_argument("folder", type=Path, nargs="?", default=os.environ.get(DRAIN_VARIABLE))
    parser.add_argument("--timeout", type=float, default=25.0, help="seconds to wait")
    given = parser.parse_args(arguments)
    if given.folder is None:
        parser.error(f"{DRAIN_VARIABLE} is not set, so the server was not started to be drained")
    return 0 if drained(Path(given.folder), given.timeout) else 1


if __name__ == "__main__":
    sys.exit(main())
