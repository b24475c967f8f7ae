"""Whether an index fits into this machine's memory, asked before hours are spent on it."""

from __future__ import annotations

from runtime.errors import InputError
from runtime.indexes.plan import Plan
from runtime.machine import available_memory_bytes

__all__ = ["require_memory"]


def require_memory(plan: Plan, n_rows: int) -> None:
    """Refuse an index that cannot be held while it is built.

    Raises:
        InputError: it takes more memory than is available; never where the system does not say what is.
    """
    needed = plan.row_bytes * n_rows + 4 * plan.space.dim * plan.n_training_rows
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"A {plan.kind.value} index of {n_rows:,} rows takes {needed / 1e9:.1f} GB of memory while it is "
            f"built; {available / 1e9:.1f} GB are available. An ivf-pq index of short codes takes least: "
            f"--kind ivf-pq --code-bytes 32 needs about {40 * n_rows / 1e9:.1f} GB."
        )
