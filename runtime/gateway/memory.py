"""Memory that a large request leaves behind, given back to the system."""

from __future__ import annotations

import asyncio
import ctypes
from typing import Any

__all__ = ["MemoryTrim"]

_LARGE = 1 << 20
_AFTER_S = 1.0


class MemoryTrim:
    """Gives freed memory back to the system a second after a large request; use it from one event loop.

    The C library keeps what it got for a large body and its texts. Where it is not glibc, nothing is done.
    """

    def __init__(self) -> None:
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._is_due = False

    def note_released(self, n_bytes: int) -> None:
        """Note that a request has ended which held so many bytes."""
        if n_bytes >= _LARGE and self._trim is not None and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(_AFTER_S, self._run)

    def _run(self) -> None:
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
