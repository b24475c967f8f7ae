"""Gate of a Python model: open until its server is drained; see ``runtime/draining.py``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from runtime.draining import DRAIN_VARIABLE, DrainedKind
from triton_models.answers import Code, Failure

__all__ = ["STOPPING", "DrainGate"]

_LOOK_S = 0.1

STOPPING = Failure(Code.UNAVAILABLE, "stopping", "The server is stopping. Ask again, or ask another one.")
"""Answer to requests that come too late."""


class DrainGate:
    """Count of the running requests of one process, and its refusal of those that come too late."""

    def __init__(self, kind: DrainedKind, folder: str | None = None) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._n_running = 0
        self._is_open = True
        self._ended = threading.Event()
        named = folder or os.environ.get(DRAIN_VARIABLE)
        self._mark = None if not named else Path(named) / f"{os.getpid()}.{kind.value}"
        if self._mark is not None:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
            threading.Thread(
                target=self._watch, args=(self._mark,), name="babeltower-gate", daemon=True
            ).start()

    @contextlib.contextmanager
    def answering(self, n_requests: int) -> Iterator[bool]:
        """Count requests as running within the block; false if they came too late and must be refused."""
        with self._lock:
            is_open = self._is_open
            self._n_running += n_requests
        try:
            yield is_open
        finally:
            with self._lock:
                self._n_running -= n_requests

    def close(self) -> None:
        """End the watch; an unloaded model runs nothing."""
        self._ended.set()
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)

    def _watch(self, mark: Path) -> None:
        while not self._ended.wait(_LOOK_S):
            if self._kind.is_asked_to_stop(mark):
                with self._lock:
                    self._is_open = False
                    is_idle = self._n_running == 0
                if is_idle:
                    with contextlib.suppress(OSError):
                        mark.rename(mark.with_suffix(".drained"))
                    return
