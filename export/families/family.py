"""What a family is: how to recognise its checkpoints and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.towers import Towers
from export.weights.adapters import Adapter

__all__ = ["Family", "LoadOptions", "file_of", "folder_of"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a checkpoint may leave open.

    ``adapter`` is a LoRA adapter to merge; ``context_length`` (tokens) replaces the family's.
    """

    adapter: Adapter | None = None
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint.

    ``claims`` says whether a folder, or the folder around a weight file, holds one; it reads configuration
    files only. ``load`` raises CheckpointError for anything it cannot read faithfully.
    """

    name: str
    claims: Callable[[Path], bool]
    load: Callable[[Path, LoadOptions], Towers]
    licence: str
    forms: str


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint that was named by its folder or by its weight file."""
    return path if path.is_dir() else path.parent


def file_of(path: Path) -> Path | None:
    """The weight file that was named; ``None`` for a folder, whose own is to be found."""
    return None if path.is_dir() else path
