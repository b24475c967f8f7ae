"""Double of a tower behind a front end, without a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from triton_models.answers import Tower, TowerError, TowerRun

__all__ = ["tower_from_call"]


def tower_from_call(call: Callable[[Mapping[str, NDArray[Any]], Sequence[str]], list[NDArray[Any]]]) -> Tower:
    """Make a tower from a function that makes one call, and raises TowerError if the call fails."""

    def outcome(run: TowerRun) -> list[NDArray[Any]] | TowerError:
        try:
            return call(run.inputs, run.outputs)
        except TowerError as error:
            return error

    return lambda runs: [outcome(run) for run in runs]
