"""Text cleaning as data for the page: replaced characters, spaces, and patterns of what it does not clean.

The cleaning of the reference tokenizers rests on ftfy, which no browser has. What it does to single
characters is found by cleaning every character; what it does to longer passages, decoding HTML references and
mending mojibake, is only recognised, so that the page can tell.
"""

from __future__ import annotations

import html.entities
import re
import string
import sys
from collections.abc import Iterator
from typing import Any

from export.layouts.cleaning_rules import replaced_characters
from runtime.preprocessing.cleaning import clean_whitespace

__all__ = ["cleaning_rules", "javascript_pattern"]


def cleaning_rules(kind: str) -> dict[str, Any]:
    """Return the cleaning of ``TextPreprocessing.clean`` as plain values; patterns are JavaScript's."""
    if kind == "none":
        replaced: dict[str, str] = {}
    else:
        replaced = {**replaced_characters(), **_replaced_controls()}
    return {
        "kind": kind,
        "replaced": sorted(replaced.items()),
        "spaces": _escaped(filter(str.isspace, map(chr, range(sys.maxunicode + 1)))),
        "punctuation": _escaped(string.punctuation),
        "mojibake": _mojibake(),
        "references": _references(),
    }


def _replaced_controls() -> dict[str, str]:
    """Return the replacements of C0 controls that are not white space to the cleaning."""
    found = {}
    for character in map(chr, (*range(0x20), 0x7F)):
        cleaned = clean_whitespace(f"a{character}a")
        if cleaned == "aa":
            found[character] = ""
    return found


def _escaped(characters: Iterator[str] | str) -> str:
    """Return characters as the inside of a JavaScript class."""
    return "".join(f"\\u{{{ord(character):x}}}" for character in characters)


def _references() -> str:
    """Return a pattern of what HTML unescaping changes: numbers, names with ``;``, and old names without."""
    old = sorted(name for name in html.entities.html5 if not name.endswith(";"))
    return f"&(?:#[0-9]|#[xX][0-9a-fA-F]|[A-Za-z][A-Za-z0-9]*;|(?:{'|'.join(old)}))"


def _mojibake() -> str:
    """Return ftfy's pattern of text that was decoded wrongly, C1 controls and terminal escapes included."""
    from ftfy.badness import BADNESS_RE

    return rf"[\u{{80}}-\u{{9f}}]|\u{{1b}}\[|{javascript_pattern(BADNESS_RE)}"


def javascript_pattern(pattern: re.Pattern[str]) -> str:
    """Translate a verbose pattern to JavaScript's syntax with the flag ``u``.

    Spaces and comments outside classes are dropped, and ``\\s`` and ``\\w`` are Python's.
    """
    found, in_class = [], False
    source = iter(pattern.pattern)
    for one in source:
        if one == "\\":
            found.append(
                _SHORTHANDS[next(source)] if not in_class else _escape_in_class(next(source), source)
            )
        elif in_class:
            in_class = one != "]"
            is_syntax = one in "]-" or (one == "^" and found[-1] == "[")
            found.append(one if is_syntax else _escaped(one))
        elif one == "#":
            for skipped in source:
                if skipped == "\n":
                    break
        elif one not in string.whitespace:
            in_class = one == "["
            found.append(one)
    return "".join(found)


_SHORTHANDS = {"s": r"[\s\u{1c}-\u{1f}\u{85}]", "w": r"[\p{L}\p{N}_]"}


def _escape_in_class(kind: str, source: Iterator[str]) -> str:
    if kind == "x":
        return f"\\u{{{next(source)}{next(source)}}}"
    return _escaped(kind)
