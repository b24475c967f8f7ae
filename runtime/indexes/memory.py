"""Memory check before an index is built."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import InputError
from runtime.indexes.plan import Plan

__all__ = ["require_memory"]

_MEMINFO = Path("/proc/meminfo")


def require_memory(plan: Plan, n_rows: int) -> None:
    """Check that an index fits into available memory while it is built.

    Raises:
        InputError: it needs more memory than is available; never raised if the available memory is unknown.
    """
    needed = plan.row_bytes * n_rows + 4 * plan.space.dim * plan.n_training_rows
    available = _available_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"A {plan.kind.value} index of {n_rows:,} rows needs {needed / 1e9:.1f} GB of memory while it is "
            f"built; {available / 1e9:.1f} GB are available. An ivf-pq index with short codes needs least: "
            f"--kind ivf-pq --code-bytes 32 needs about {40 * n_rows / 1e9:.1f} GB."
        )


def _available_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)
