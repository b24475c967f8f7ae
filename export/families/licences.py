"""Licence of a checkpoint's weights."""

from __future__ import annotations

import re
from pathlib import Path

from export.families.published import LICENCES

__all__ = ["licence_of_folder", "licence_with_adapter"]

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.MULTILINE | re.DOTALL)


def licence_of_folder(folder: Path, family: str) -> str:
    """Return the licence in the folder's model card, or else that of the family's published weights."""
    return _stated(folder) or LICENCES[family]


def licence_with_adapter(base: str, adapter: Path) -> str:
    """Return the licence of a merged adapter: the base's, and the adapter's if it differs."""
    own = _stated(adapter)
    return base if own is None or own.lower() == base.lower() else f"{base} (base), {own} (adapter)"


def _stated(folder: Path) -> str | None:
    """Read ``license`` from the model card's front matter, or ``license_name`` if that is ``other``."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        return None
    fields: dict[str, str] = {
        key: value.strip("'\"[] \t")
        for key, value in re.findall(
            r"^(license|license_name):\s*(?:- *)?([^\r\n]*)", found.group(1), re.MULTILINE
        )
    }
    if fields.get("license") == "other" and fields.get("license_name"):
        return fields["license_name"]
    return fields.get("license") or None
