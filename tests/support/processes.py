"""What the processes of a server take."""

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
