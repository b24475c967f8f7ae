"""Workers of one output folder: their identity, heartbeats, and which of them are alive.

A worker writes a small file again and again. Others watch the file change by their own clocks, so clocks need
not agree. A worker whose file is gone, whose process has ended on this machine, or whose file has not changed
for the length of a lease is dead, and its parts may be claimed again. A worker that is only slow finds out
when it publishes: see ``Journal.finish``.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.corpus.stores import Store
from runtime.errors import CorpusError
from runtime.logs import LOGGER

__all__ = ["LEASE_S", "Fleet", "worker_file"]

LEASE_S = 60.0
"""Seconds without a heartbeat after which a worker's parts may be claimed by others."""

_BEATS_PER_LEASE = 6
_LOOK_AGAIN_S = 0.5


def worker_file(name: str) -> str:
    """Return the name of a worker's file."""
    return f"_journal/worker-{name}.json"


@dataclass(slots=True)
class _Sight:
    """A worker's file when it was last seen to change."""

    content: bytes | None
    changed_at: float
    looked_at: float


@dataclass(slots=True)
class Fleet:
    """This process as a worker of a folder, and its view of the others.

    Attributes:
        lease_s: See ``LEASE_S``; the longest lease of a folder's workers decides for each of them.
        name: Name of this worker, unique for every run of a process.
    """

    store: Store
    lease_s: float = LEASE_S
    name: str = field(default_factory=lambda: f"{os.getpid()}-{os.urandom(6).hex()}")
    said: dict[str, Any] = field(default_factory=dict)
    _sights: dict[str, _Sight] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _n_beats: int = 0

    def start(self) -> None:
        """Write this worker's file, and again several times a lease on a thread."""
        self.beat()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="babeltower-heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """End the heartbeat and remove this worker's file: whatever it holds is free."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            try:
                self.store.remove(worker_file(self.name))
            except CorpusError as error:  # the others wait for the end of the lease
                LOGGER.warning("%s", error)

    def beat(self) -> None:
        """Write this worker's file once."""
        self._n_beats += 1
        data = {**_process(), "lease_s": self.lease_s, "beat": self._n_beats, **self.said}
        self.store.replace(worker_file(self.name), json.dumps(data).encode())

    def _beat_on(self) -> None:
        while not self._stopped.wait(self.lease_s / _BEATS_PER_LEASE):
            try:
                self.beat()
            except CorpusError as error:
                LOGGER.warning("the heartbeat of this worker failed: %s", error)

    def look_again(self) -> None:
        """Read every worker's file anew at the next question."""
        for sight in self._sights.values():
            sight.looked_at = float("-inf")

    def is_alive(self, name: str) -> bool:
        """Return True unless a worker is known to be dead."""
        if name == self.name:
            return True
        now = time.monotonic()
        sight = self._sights.get(name)
        if sight is None or now - sight.looked_at > _LOOK_AGAIN_S:
            content = self.store.read(worker_file(name))
            if sight is None or sight.content != content:
                sight = self._sights[name] = _Sight(content, now, now)
            sight.looked_at = now
        if sight.content is None:
            return False
        said = said_by_worker(sight.content)
        if now - sight.changed_at > max(self.lease_s, float(said.get("lease_s", 0))):
            return False
        return not _has_ended(said)

    def said_of(self, name: str) -> Mapping[str, Any]:
        """Return what a living worker says of itself; empty for a dead one."""
        if not self.is_alive(name):
            return {}
        if name == self.name:
            return self.said
        return said_by_worker(self._sights[name].content or b"")

    def forget_dead(self, names: list[str]) -> None:
        """Remove the files of workers that are dead."""
        for name in names:
            if not self.is_alive(name):
                self.store.remove(worker_file(name))


def said_by_worker(content: bytes) -> Mapping[str, Any]:
    """Return what a worker's file says; empty if it was cut short."""
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _process() -> dict[str, Any]:
    """Identify this process on its machine, so that others there see at once when it has ended."""
    return {
        "host": platform.node(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "process": os.getpid(),
        "started": _started(os.getpid()),
    }


def _has_ended(said: Mapping[str, Any]) -> bool:
    """Return True if a process is known to have ended; that of another machine is never known to have."""
    own = _process()
    if not own["boot"] or any(said.get(name) != own[name] for name in ("boot", "namespace")):
        return False
    return bool(said.get("started")) and _started(int(said["process"])) != said["started"]


def _started(process: int) -> str:
    """Return a process's start time, which tells it from a later one of the same number."""
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
