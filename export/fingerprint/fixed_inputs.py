"""Fixed inputs of the fingerprint; changing any of them changes every fingerprint.

Random integers are generated here, independently of any library's random generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.parity.probes import names_by_language
from export.towers import Int
from runtime.manifest import TextPreprocessing

__all__ = ["fixed_images", "fixed_pixels", "fixed_texts", "fixed_token_rows"]

_SHORT = 16
"""Padded length, in tokens, of the batch with mixed row lengths."""

PECULIAR = (
    "",
    " ",
    "a",
    "A",
    "  two  spaces, a\ttab,\na line ",
    "\u00a0no-break\u2003em\u3000ideographic\ufeff spaces",
    "ﬁne ﬂour Ⅻ ① ㍍ ㌔ ｆｕｌｌ　ｗｉｄｔｈ ﾊﾝｶｸ ½ x² H₂O ™",
    "e\u0301 \u00e9 A\u030a \u00c5 \u212b \u0301 n\u0303o",
    "ÀÉÎÕÜ ÇŞĞİ ı ß ẞ Æ œ Đ ł Σίσυφος ΣΊΣΥΦΟΣ ЁЖИК ёжик",
    "عَرَبِيّ ﻋﺮﺑﻲ ـــ ي ی ك ک ١٢٣ ۱۲۳",
    "שָׁלוֹם שלום",
    "हिन्दी क्षत्रिय १२३ தமிழ் ภาษาไทย ខ្មែរ မြန်မာ བོད་ཡིག",
    "漢字 汉字 한글 한글 ひらがな カタカナ が が",
    "👩\u200d🚀 👍🏽 🏳\ufe0f\u200d🌈 ❤ ❤\ufe0f a\u200bb a\u200cb a\u00adb",
    "“quoted” ‘single’ «guillemets» ``ticks'' … – — ― - ‐ /",
    "&amp; &lt;b&gt; &#39; &amp;amp; <br/> http://example.org/?q=a&b=c",
    "\x00\x01\x1f\x7f\x85 \ufffd \U0010ffff \ue000",
    "don't can't I'M l'été d\u2019eau 3.14 1,000 1e-5 C++ #tag @name",
    "<s> </s> <pad> <unk> <mask> a <pad> b <s>c</s> ▁ ▁a eng_Latn por_Latn",
    "ᎠᏂ ꦗꦮ ⵜⴰⵎⴰⵣⵉⵖⵜ ߒߞߏ 𐐀 𝒳 🀄 𠮷",
)
"""Edge-case texts that reveal differences in normalisation, pre-tokenisation and special tokens."""


def fixed_texts(preprocessing: TextPreprocessing) -> tuple[list[str], list[str]]:
    """Return texts and their languages: names in 106 languages, edge cases, texts near the context length."""
    names = names_by_language()
    words = [texts[0] for texts in names.values()]
    length = preprocessing.context_length
    long = [
        " ".join(words),
        " ".join(reversed(words)),
        *(
            " ".join(f"{n}" for n in range(1, n_words + 1))
            for n_words in range(max(1, length - 4), length + 3)
        ),
    ]
    known = sorted(preprocessing.language_ids) or ["eng_Latn"]
    usual = "eng_Latn" if "eng_Latn" in known else known[0]
    texts = [text for own in names.values() for text in own]
    texts += [*PECULIAR, *long]
    return [*texts, "cat", "cat"], [*[usual] * len(texts), known[0], known[-1]]


def fixed_token_rows(preprocessing: TextPreprocessing, n_tokens: int) -> Iterator[tuple[Int, Int]]:
    """Yield ids and masks: one full-context row; then a full row, one with a pad inside, and padded rows.

    Args:
        n_tokens: Rows of the embedding table.
    """
    pad_id, first = preprocessing.pad_id, preprocessing.pad_id + 1
    length = preprocessing.context_length
    ids = first + _numbers(length, seed=1) % (n_tokens - first)
    yield ids.reshape(1, length), np.ones((1, length), np.int64)
    width = min(_SHORT, length)
    rows = (first + _numbers(4 * width, seed=2) % (n_tokens - first)).reshape(4, width)
    lengths = (width, width, max(2, width // 2 + 1), 2)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    rows[mask == 0] = pad_id
    rows[1, width // 2] = pad_id
    yield rows, mask


def fixed_pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Return uint8 (2, 3, height, width): noise, and a different gradient per channel, both asymmetric."""
    noise = (_numbers(3 * height * width, seed=3) % 256).reshape(3, height, width)
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    red = 255 * x // width + 0 * y
    green = 200 * y // height + 0 * x
    blue = (180 * (x * height + 2 * y * width)) // (3 * height * width)
    return np.stack([noise, np.stack([red, green, blue])]).astype(np.uint8)


def fixed_images(height: int, width: int) -> Iterator[Image.Image]:
    """Yield RGB gradient images: one of exactly this size, a wide one and a tall one."""
    for size in (
        (height, width),
        (height + height // 2 + 1, 2 * width + 3),
        (3 * height, width + width // 4),
    ):
        yield Image.fromarray(np.ascontiguousarray(fixed_pixels(*size)[1].transpose(1, 2, 0)))


def _numbers(n: int, *, seed: int) -> Int:
    """Return integers from 0 to 2**32 - 1: the upper halves of SplitMix64 outputs.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    numbers: Int = (z >> np.uint64(32)).astype(np.int64)
    return numbers
