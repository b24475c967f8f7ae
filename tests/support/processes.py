"""What the processes of a server take, and which are a Ray cluster's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def memory_bytes(session: int) -> int:
    """Resident memory of the server and its Python models."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) == session:
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def actors_of_this_process() -> list[int]:
    """Processes of the actors that hold a model, in Ray clusters that this process started, oldest first."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            name = (process / "cmdline").read_text()
            if name.startswith("ray::") and "Embedder" in name and _is_ours(int(process.name)):
                found.append(int(process.name))
    return sorted(found)


def _is_ours(pid: int) -> bool:
    while pid > 1:
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        if pid == os.getpid():
            return True
    return False
