"""What a front end says to one request: vectors, or why not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError, ImageError, InputError, LanguageError, message_from_error

__all__ = ["AnswerVectors", "Code", "Failure", "Tower", "TowerError", "failure_from_error", "require_vectors"]


class Code(Enum):
    """Status of a failed request; the names are those of ``pb_utils.TritonError``."""

    INVALID_ARG = "invalid argument"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no vectors; ``reason`` is a short word for counting.

    The message of an input that is refused begins with the class of the error that it raises in process.
    """

    code: Code
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class AnswerVectors:
    """float32 (rows, dim), L2-normalised; ``truncated`` bool (rows,) where a text was cut, else ``None``."""

    vectors: NDArray[np.float32]
    truncated: NDArray[np.bool_] | None = None


class TowerError(BabeltowerError):
    """The tower did not answer, or not with vectors."""

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


Tower: TypeAlias = Callable[[Mapping[str, NDArray[Any]], Sequence[str]], Awaitable[list[NDArray[Any]]]]
"""Calls the tower: named inputs and the outputs wanted → those outputs; raises TowerError."""


def failure_from_error(error: BabeltowerError) -> Failure:
    """What the client is told about an error, and what it is counted under."""
    if isinstance(error, TowerError):
        return Failure(error.code, "tower", str(error))
    if isinstance(error, InputError):
        reasons = {LanguageError: "language", ImageError: "image"}
        return Failure(Code.INVALID_ARG, reasons.get(type(error), "input"), message_from_error(error))
    return Failure(Code.INTERNAL, "internal", str(error))


def require_vectors(vectors: NDArray[Any], shape: tuple[int, int], output: str) -> NDArray[np.float32]:
    """Let a tower's output pass or not.

    Raises:
        TowerError: another shape than asked for, or numbers that are not finite.
    """
    if vectors.shape != shape:
        raise TowerError(f"Output {output!r} of the tower has shape {vectors.shape}; expected {shape}.")
    if not np.isfinite(vectors).all():
        raise TowerError(f"Output {output!r} of the tower is not finite: the precision overflows in it.")
    return vectors.astype(np.float32, copy=False)
