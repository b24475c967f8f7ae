"""Words of a caller that stand for one of a few choices."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from runtime.errors import EngineError

__all__ = ["choice_from_value"]

Choice = TypeVar("Choice", bound=Enum)


def choice_from_value(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """A member, or the member of a value.

    Raises:
        EngineError: there is no such; ``name`` says of what.
    """
    try:
        return kind(value)
    except ValueError:
        raise EngineError(
            f"{name} {value!r} is unknown; expected one of {[known.value for known in kind]}."
        ) from None
