"""Characters of each language, from CLDR."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib import resources

__all__ = ["SOURCE", "characters_of_languages", "is_written_in"]

SOURCE = "CLDR exemplar characters, main and auxiliary"
"""Source of the characters, for the manifest."""


def characters_of_languages(languages: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the letters and marks of each language (FLORES-200 code), in both cases, normalised to NFKC.

    Languages that CLDR has no characters for are left out.
    """
    known = _characters()
    return {code: frozenset(known[code]) for code in languages if code in known}


def is_written_in(piece: str, characters: frozenset[str]) -> bool:
    """Check that all letters and marks of a piece are among the characters.

    Digits, punctuation, symbols and spaces belong to no language, so that every language has them.
    """
    return all(one in characters or unicodedata.category(one)[0] not in "LM" for one in piece)


@cache
def _characters() -> dict[str, str]:
    """Read ``characters.json``, which ``python -m samples.characters`` writes."""
    text = resources.files("export.vocabulary").joinpath("characters.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)["characters"]
    return found
