"""Memory check before an index is built."""

from __future__ import annotations

from runtime.errors import InputError
from runtime.indexes.plan import Plan
from runtime.machine import available_memory_bytes

__all__ = ["require_memory"]


def require_memory(plan: Plan, n_rows: int) -> None:
    """Check that an index fits into available memory while it is built.

    Raises:
        InputError: it needs more memory than is available; never raised if the available memory is unknown.
    """
    needed = plan.row_bytes * n_rows + 4 * plan.space.dim * plan.n_training_rows
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"A {plan.kind.value} index of {n_rows:,} rows needs {needed / 1e9:.1f} GB of memory while it is "
            f"built; {available / 1e9:.1f} GB are available. An ivf-pq index with short codes needs least: "
            f"--kind ivf-pq --code-bytes 32 needs about {40 * n_rows / 1e9:.1f} GB."
        )
