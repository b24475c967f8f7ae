"""Text cleaning as rules of a tokenizer's file, for servers that only collapse white space.

open_clip's tokenizers straighten quotes, drop invisible controls and compose characters before anything
else; with curly quotes left as they are, texts in Uzbek, Welsh or Assamese have other vectors. The rules are
found by cleaning every character, so that they follow the cleaning.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import defaultdict
from functools import cache

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Subwords

from runtime.preprocessing.cleaning import clean_whitespace

__all__ = ["add_cleaning", "replaced_characters"]


def add_cleaning(subwords: Subwords) -> None:
    """Make a tokenizer clean texts, in place, as far as single characters can tell.

    HTML references, terminal escapes and mojibake stay as they are: they take more than a character to see.
    Characters that the tokenizer's own normalizer treats alike are left to it.
    """
    own = subwords.normalizer

    def normalised(text: str) -> str:
        return text if own is None else str(own.normalize_str(unicodedata.normalize("NFC", text)))

    by_replacement: dict[str, str] = defaultdict(str)
    for character, replacement in replaced_characters().items():
        if normalised(f"a{character}a") != normalised(f"a{replacement}a"):
            by_replacement[replacement] += character
    rules = [
        normalizers.Replace(Regex(f"[{re.escape(characters)}]"), replacement)
        for replacement, characters in by_replacement.items()
    ]
    subwords.normalizer = normalizers.Sequence([*rules, normalizers.NFC(), *([] if own is None else [own])])


@cache
def replaced_characters() -> dict[str, str]:
    """Return the replacement of every character that cleaning changes wherever it stands.

    Left out are white space, combining characters, which change with their neighbours, and C1 controls, which
    are mojibake.
    """
    found = {}
    for code in range(0x20, sys.maxunicode + 1):
        character = chr(code)
        if character.isspace() or unicodedata.category(character) in ("Cc", "Cs", "Cn", "Co", "Mn"):
            continue
        cleaned = clean_whitespace(f"a{character}a")
        if cleaned != f"a{character}a" and unicodedata.normalize("NFC", character) != cleaned[1:-1]:
            found[character] = cleaned[1:-1]
    return found
