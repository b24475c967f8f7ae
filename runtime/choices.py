"""Conversion of a caller's strings to enum members."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from runtime.errors import EngineError

__all__ = ["choice_from_value"]

Choice = TypeVar("Choice", bound=Enum)


def choice_from_value(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """Convert a string to an enum member; a member is returned as is.

    Raises:
        EngineError: the value is unknown; ``name`` names the option in the message.
    """
    try:
        return kind(value)
    except ValueError:
        raise EngineError(
            f"{name} {value!r} is unknown; expected one of {[known.value for known in kind]}."
        ) from None
