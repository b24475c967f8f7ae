"""``babeltower serve`` as a process of its own, which can be killed and outlives what it serves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from runtime.server import ServerEnvironment

__all__ = ["ServeProcess", "wait_until"]

_PATIENCE_S = 120.0


def wait_until(holds: Callable[[], object], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Wait until a condition holds; what never comes is a failure that says so."""
    give_up_at = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"not within {patience_s:.0f} s: {what}")
        time.sleep(0.05)


class ServeProcess:
    """``babeltower serve`` of a repository, and every line that it has printed."""

    def __init__(self, repository: Path | str, environment: ServerEnvironment, *arguments: str) -> None:
        command = [sys.executable, "-m", "babeltower", "serve", str(repository), *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "BABELTOWER_SERVER_ENV": str(environment.folder),
                "PYTHONUNBUFFERED": "1",
            },
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServeProcess:
        """Use the process; it ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process, by a kill if it does not end in time."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(_PATIENCE_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_until_served(self, n_starts: int = 1, *, last_line: str = "metrics ") -> None:
        """Wait until the addresses were printed that many times."""
        wait_until(
            lambda: (
                sum(line.startswith(last_line) for line in self.lines) >= n_starts
                or self.process.poll() is not None
            ),
            "the server is ready",
        )
        assert self.process.poll() is None, "\n".join(self.lines)

    def address(self, name: str) -> str:
        """Address of an endpoint as it was printed, ``http`` or ``grpc``, with its scheme."""
        return next(line.split()[1] for line in self.lines if line.startswith(f"{name} "))

    @property
    def server_pid(self) -> int:
        """Process id of the Triton server, the one child."""
        (pid,) = self.children
        return pid

    @property
    def children(self) -> list[int]:
        """Process ids of the Triton servers that run: one, or none between two."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(c) for c in children if "tritonserver" in Path(f"/proc/{c}/comm").read_text()]
