"""Work on threads beside a block, such as the traffic of clients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Background"]

_Self = TypeVar("_Self", bound="Background")


class Background:
    """Work that threads do while a block runs; each piece of it returns once ``is_over`` is set."""

    def __init__(self, *work: Callable[[], None]) -> None:
        self.is_over = threading.Event()
        self._threads = [threading.Thread(target=piece, daemon=True) for piece in work]

    def __enter__(self: _Self) -> _Self:
        """Begin the work."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the work, and wait until it has."""
        self.is_over.set()
        for thread in self._threads:
            thread.join()
