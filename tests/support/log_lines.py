"""Lines that the project's logger writes, for tests that run without pytest's logging plugin."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from runtime.logs import LOGGER

__all__ = ["logged_lines"]


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextlib.contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Yield a list that grows by every warning of the block."""
    lines: list[str] = []
    handler = _Lines(lines)
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)
