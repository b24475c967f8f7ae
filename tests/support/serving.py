"""``babeltower serve`` and ``rollout`` as processes of their own, for tests that kill them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.timing.serve_process import ServeProcess as Serving
from bench.timing.serve_process import wait_until

__all__ = ["Serving", "rollout_process", "wait_until"]


def rollout_process(model: Path, *arguments: str) -> subprocess.Popen[str]:
    """``babeltower rollout`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "babeltower", "rollout", str(model), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
