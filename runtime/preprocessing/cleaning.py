"""Text cleaning of the reference tokenizers, applied before tokenization."""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache

from runtime.errors import InputError

__all__ = [
    "MOST_EXPANDED",
    "clean_canonicalize",
    "clean_lower",
    "clean_whitespace",
    "n_expanded",
    "whole_characters",
]

MOST_EXPANDED = 18
"""Most characters that one becomes in ``n_expanded``."""

_LONGEST_FAST_PATH = 65_536
"""Longest text of the fast path, well below the length at which ftfy splits lines."""

_PLAIN_ASCII = re.compile(r"[\t\n -%'-~]*")
"""Printable ASCII without ``&``, unaffected by ftfy and HTML unescaping."""

_TOUCHED_BY_FTFY = re.compile(
    "[&"  # HTML references
    "\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029"  # line ends, control characters, terminal escapes
    "\u206a-\u206f\ufeff\ufff9-\ufffc"  # control characters that ftfy removes
    "\u02bc\u2018-\u201f"  # curled quotes
    "\u3000\uff01-\uffef"  # full and half width
    "\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06"  # ligatures and digraphs
    "\ud800-\udfff]"  # surrogates
)

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_whitespace(text: str) -> str:
    """Fix mojibake, unescape HTML references, and collapse white space.

    Source:
        ``open_clip.tokenizer.get_clean_fn("whitespace")``; equal to it on every text without lone
        surrogates. Text that ftfy would not change skips ftfy.
    """
    return " ".join(_mended(text).split())


def clean_lower(text: str) -> str:
    """Clean as ``clean_whitespace``, then convert to lower case.

    Source:
        ``open_clip.tokenizer.get_clean_fn("lower")``.
    """
    return clean_whitespace(text).lower()


def clean_canonicalize(text: str) -> str:
    """Fix mojibake, unescape HTML references, remove ASCII punctuation, lower, collapse white space.

    Source:
        ``open_clip.tokenizer.get_clean_fn("canonicalize")``, SigLIP's cleaning; underscores become spaces.
    """
    return " ".join(_mended(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def _mended(text: str) -> str:
    if _PLAIN_ASCII.fullmatch(text) or _is_left_alone_by_ftfy(text):
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _is_left_alone_by_ftfy(text: str) -> bool:
    """Check whether every step of ``ftfy.fix_text`` is known to leave the text unchanged."""
    if len(text) > _LONGEST_FAST_PATH or _TOUCHED_BY_FTFY.search(text):
        return False
    return unicodedata.is_normalized("NFC", text) and not _badness()(text)


@cache
def _badness() -> Callable[[str], bool]:
    from ftfy.badness import is_bad

    found: Callable[[str], bool] = is_bad
    return found


def n_expanded(text: str) -> int:
    """Return the number of characters that a tokenizer reads: SentencePiece's normalize as NFKC does."""
    if text.isascii():
        return len(text)
    return max(len(text), len(unicodedata.normalize("NFKC", text)))


def whole_characters(text: str, name: str) -> str:
    """Join surrogate pairs into characters, and reject lone surrogates.

    Raises:
        InputError: the text has a lone surrogate, which is not a character and has no UTF-8 encoding.
    """
    if text.isascii() or not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise InputError(
            f"{name} holds a lone surrogate, which is half a character: {_around_surrogate(text)!a}. The "
            "text was decoded wrongly: decode its bytes as UTF-8, or replace lone surrogates with "
            'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        ) from None


def _around_surrogate(text: str) -> str:
    found = _SURROGATE.search(text)
    return text[max(0, found.start() - 8) : found.end() + 8] if found else text
