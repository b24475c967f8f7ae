"""What the processes of a server take, and which are a Ray cluster's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def memory_bytes(session: int) -> int:
    """Resident memory of the server and its Python models."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) == session:
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def processes_of(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def proportional_bytes(pids: list[int]) -> int:
    """Memory of processes; what several share is counted once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


@contextlib.contextmanager
def peak_of_processes(pid: int) -> Iterator[list[int]]:
    """Measure the most memory of a process and its children within the block.

    Yields:
        A list that holds the memory before, and afterwards also the peak.
    """
    pids = processes_of(pid)
    found = [proportional_bytes(pids)]
    ended, samples = threading.Event(), [found[0]]

    def measure() -> None:
        while not ended.is_set():
            samples.append(proportional_bytes(pids))

    measuring = threading.Thread(target=measure)
    measuring.start()
    try:
        yield found
    finally:
        ended.set()
        measuring.join()
        found.append(max(samples))


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
