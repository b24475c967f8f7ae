"""Memory that a large request leaves behind, given back to the system."""

from __future__ import annotations

import asyncio

from runtime.machine import return_free_memory

__all__ = ["MemoryTrim"]

_LARGE = 1 << 20
_AFTER_S = 1.0


class MemoryTrim:
    """Gives freed memory back to the system a second after a large request; use it from one event loop.

    The C library keeps what it got for a large body and its texts.
    """

    def __init__(self) -> None:
        self._is_due = False

    def note_released(self, n_bytes: int) -> None:
        """Note that a request has ended which held so many bytes."""
        if n_bytes >= _LARGE and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(_AFTER_S, self._run)

    def _run(self) -> None:
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, return_free_memory)
