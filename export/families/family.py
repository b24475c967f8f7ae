"""Description of a model family: recognise its checkpoints and load them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.towers import Towers
from export.weights.adapters import Adapter

__all__ = ["Family", "LoadOptions", "file_of", "folder_of"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options for loading a checkpoint.

    ``adapter`` is a LoRA adapter to merge; ``context_length`` (tokens) overrides the family's;
    ``image_tower`` is an open_clip folder, or a weight file in one, for a family whose checkpoints hold none.
    """

    adapter: Adapter | None = None
    context_length: int | None = None
    image_tower: Path | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Model family.

    ``claims`` returns True if a folder, or the folder of a weight file, holds a checkpoint of the family; it
    reads configuration files only. ``load`` raises CheckpointError for anything it cannot read exactly.
    ``needs_image_tower`` is True if checkpoints hold the text tower alone.
    """

    name: str
    claims: Callable[[Path], bool]
    load: Callable[[Path, LoadOptions], Towers]
    licence: str
    forms: str
    needs_image_tower: bool = False


def folder_of(path: Path) -> Path:
    """Return the checkpoint folder of a path that is the folder itself or a weight file in it."""
    return path if path.is_dir() else path.parent


def file_of(path: Path) -> Path | None:
    """Return the path if it is a weight file, or None if it is a folder."""
    return None if path.is_dir() else path
