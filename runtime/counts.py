"""Checks of counts that callers pass: threads, rows, widths."""

from __future__ import annotations

import operator
from typing import Any

from runtime.errors import BabeltowerError, EngineError, InputError

__all__ = ["require_count", "require_threads", "whole_number"]

_MOST_THREADS = 1_024
"""More are a mistake: engines start every thread at once, and a machine may stand still."""


def whole_number(value: Any, name: str, *, error: type[BabeltowerError] = InputError) -> int:
    """Return a whole number, NumPy's included, as Python's ``int``; arguments as of ``require_count``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise error(f"{name} is {value!r}, of type {type(value).__name__}; expected a whole number.")
    return number


def require_count(
    value: Any, name: str, *, most: int | None = None, error: type[BabeltowerError] = InputError
) -> int:
    """Return a whole number of at least 1, as Python's ``int``.

    Args:
        name: Name of the option, for the message.
        error: Class of the error that is raised otherwise.
    """
    count = whole_number(value, name, error=error)
    if count < 1:
        raise error(f"{name} is {count}; expected at least 1.")
    if most is not None and count > most:
        raise error(f"{name} is {count}; expected at most {most}.")
    return count


def require_threads(
    threads: Any, name: str = "threads", *, error: type[BabeltowerError] = EngineError
) -> int | None:
    """Return a number of threads or of concurrent runs, from 1 to 1,024, or ``None`` for the default."""
    return None if threads is None else require_count(threads, name, most=_MOST_THREADS, error=error)
