"""Towers that give their memory back when nobody has used them for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

__all__ = ["IdleTimer"]


class IdleTimer:
    """Calls a function once nothing has been used for a time; use it from one event loop.

    Args:
        after_s: Seconds without use; ``None`` for never.
        idle: Called then; once, until the next use.
    """

    def __init__(self, after_s: float | None, idle: Callable[[], Awaitable[None]]) -> None:
        self._after_s = after_s
        self._idle = idle
        self._n_users = 0
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Future[None] | None = None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Count a use within the block."""
        self._n_users += 1
        self._stop()
        try:
            yield
        finally:
            self._n_users -= 1
            self.start()

    def start(self) -> None:
        """Begin to wait, unless something is in use."""
        self._stop()
        if self._after_s is not None and not self._n_users:
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self._due)

    async def close(self) -> None:
        """Stop; a call that runs is awaited."""
        self._after_s = None
        self._stop()
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._running = asyncio.ensure_future(self._idle())
