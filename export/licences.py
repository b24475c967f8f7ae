"""The licence of a checkpoint's weights."""

from __future__ import annotations

import re
from pathlib import Path

from export.published import LICENCES

__all__ = ["licence_of_folder"]

_FRONT_MATTER = re.compile(r"\A---\s*\n.*?^license:\s*(\S+).*?^---", re.MULTILINE | re.DOTALL)


def licence_of_folder(folder: Path, family: str) -> str:
    """What the folder's model card states in its front matter, else the published weights' licence."""
    card = folder / "README.md"
    found = (
        _FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    )
    return found.group(1) if found else LICENCES[family]
