"""Answer of a front end to one request: vectors or a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError, ImageError, InputError, LanguageError, message_from_error

__all__ = [
    "REASONS",
    "AnswerVectors",
    "Code",
    "Failure",
    "Tower",
    "TowerError",
    "TowerRun",
    "failure_from_error",
    "require_vectors",
]

REASONS = ("input", "language", "image", "tower", "internal", "cancelled")
"""Reasons by which failures are counted: three of the sender, two of the server, and a sender who left."""


class Code(Enum):
    """Status of a failed request, with the names of ``pb_utils.TritonError``."""

    INVALID_ARG = "invalid argument"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure of a request; ``reason`` is a short label for counting.

    The message for a rejected input starts with the class of the error that it raises in process.
    """

    code: Code
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class AnswerVectors:
    """Vectors, float32 (rows, dim), L2-normalised; ``truncated`` is bool (rows,) for texts, else ``None``."""

    vectors: NDArray[np.float32]
    truncated: NDArray[np.bool_] | None = None


class TowerError(BabeltowerError):
    """The tower failed, or its output is invalid."""

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class TowerRun:
    """One call of a tower: its inputs, and the names of the outputs to return."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[str]


Tower: TypeAlias = Callable[[Sequence[TowerRun]], list[list[NDArray[Any]] | TowerError]]
"""Function that makes calls of a tower, all in flight together; each returns its outputs, or fails alone."""


def failure_from_error(error: BabeltowerError) -> Failure:
    """Convert an error to a failure with its code, reason and message for the client."""
    if isinstance(error, TowerError):
        return Failure(error.code, "tower", str(error))
    if isinstance(error, InputError):
        reasons = {LanguageError: "language", ImageError: "image"}
        return Failure(Code.INVALID_ARG, reasons.get(type(error), "input"), message_from_error(error))
    return Failure(Code.INTERNAL, "internal", str(error))


def require_vectors(vectors: NDArray[Any], shape: tuple[int, int], output: str) -> NDArray[np.float32]:
    """Check a tower's output and return it as float32.

    Raises:
        TowerError: the shape is wrong, or a value is not finite.
    """
    if vectors.shape != shape:
        raise TowerError(f"Output {output!r} of the tower has shape {vectors.shape}; expected {shape}.")
    if not np.isfinite(vectors).all():
        raise TowerError(f"Output {output!r} of the tower is not finite: its precision overflows.")
    return vectors.astype(np.float32, copy=False)
