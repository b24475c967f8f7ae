"""What a family is: how to recognise its checkpoints and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.towers import Towers

__all__ = ["Family", "LoadOptions"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a checkpoint may leave open.

    ``base`` is the checkpoint below a LoRA adapter; ``context_length`` (tokens) replaces the family's.
    """

    base: Path | None = None
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint.

    ``claims`` says whether a folder or file holds one; it reads configuration files only. ``load`` raises
    CheckpointError for anything it cannot read faithfully.
    """

    name: str
    claims: Callable[[Path], bool]
    load: Callable[[Path, LoadOptions], Towers]
    licence: str
    forms: str
