"""Parity probes for every export: real names in 106 languages, and images in many sizes and modes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

from runtime.manifest import ImagePreprocessing, TextPreprocessing

__all__ = ["ProbeText", "names_by_language", "one_token_words", "probe_files", "probe_images", "probe_texts"]

_ORIENTATION = 0x0112
"""EXIF orientation tag; the families' libraries ignore it, so the runtime must too."""

AWKWARD = (
    "",
    " ",
    "\u0301",
    "e\u0301 \u00e9",
    "👩‍🚀 emoji",
    "a\u200bb",
    "שלום",
    "مرحبا بالعالم",
    "你好，世界",
    "a <pad> b",
    "<pad> first, or last <pad>",
    "</s> eng_Latn <mask>",
    "  Two  SPACES\tand\na line &amp; ﬁne “quotes” ½  ",
)
"""Edge-case texts: empty, blank, a lone combining mark, two normal forms, a joined emoji, a zero-width
space, right to left, CJK, spelt-out special tokens, and text that cleaning and normalising change."""

_SCRIPTS = {"Latn": " ", "Arab": " ", "Hans": "", "Thai": "", "Cyrl": " "}
"""Scripts of the texts far over the context length, and their word separators."""


@dataclass(frozen=True, slots=True)
class ProbeText:
    """Probe text and its language (FLORES-200)."""

    text: str
    language: str


def probe_texts(
    preprocessing: TextPreprocessing, *, per_language: int, words: Sequence[str] = tuple("abcdefghijklm")
) -> list[ProbeText]:
    """Return probe texts in every language of the tower, and edge-case texts.

    A language without names of its own is probed with English names, so that its token is compared too.

    Args:
        words: One-token words for texts near the context length; see ``one_token_words``.
    """
    names = names_by_language()
    known = preprocessing.language_ids or preprocessing.kept_languages or names
    probes = [
        ProbeText(text, language)
        for language in sorted(known)
        for text in names.get(language, names["eng_Latn"])[:per_language]
    ]
    any_language = "eng_Latn" if "eng_Latn" in known else next(iter(known))
    # a vocabulary may have no one-token words; the texts then only approximate the context length
    awkward = (*AWKWARD, *_long_texts(preprocessing, words or names["eng_Latn"]))
    return probes + [ProbeText(text, any_language) for text in awkward]


def one_token_words(tokenizer_json: str) -> list[str]:
    """Return words from the names that are encoded as one token, one word per token id."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    words = list(
        dict.fromkeys(" ".join(name for own in names_by_language().values() for name in own).split())
    )
    encodings = tokenizer.encode_batch(words, add_special_tokens=False)
    ids = {
        encoding.ids[0]: word for word, encoding in zip(words, encodings, strict=True) if len(encoding) == 1
    }
    return list(ids.values())


def _long_texts(preprocessing: TextPreprocessing, words: Sequence[str]) -> Iterator[str]:
    """Yield texts around the context length, then much longer ones, with varied words.

    In one-token words: one less than fits, exactly as many, one more, two more.
    """
    n_special = len(preprocessing.suffix_ids) + (
        len(preprocessing.prefix_ids) or preprocessing.needs_language
    )
    room = preprocessing.context_length - n_special
    for n_words in range(max(1, room - 1), room + 3):
        yield " ".join(words[(7 * i + i * i // 5) % len(words)] for i in range(n_words))
    names = names_by_language()
    for script, space in _SCRIPTS.items():
        written = [word for code, own in names.items() if code.endswith(script) for word in own]
        n_words = 2 * preprocessing.context_length
        yield space.join(written[i % len(written)] + str(i // len(written) or "") for i in range(n_words))


def probe_files(preprocessing: ImagePreprocessing) -> list[Image.Image | bytes]:
    """Return all probe images, as Pillow images and as encoded files.

    Adds to ``probe_images`` two images whose crop starts at half a pixel, and files with an EXIF orientation.
    """
    height, width = preprocessing.height, preprocessing.width
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    _pattern(120, 88).resize((90, 66)).save(rotated, "JPEG", quality=92, exif=exif)
    mirrored = io.BytesIO()
    exif[_ORIENTATION] = 2
    _pattern(75, 110).save(mirrored, "PNG", exif=exif)
    return [
        *probe_images(),
        _pattern(width + 3, height),
        _pattern(width, height + 7),
        rotated.getvalue(),
        mirrored.getvalue(),
    ]


def probe_images(seed: int = 0) -> list[Image.Image]:
    """Return asymmetric images, except for a single pixel: wide, tall, large and tiny, in eight modes."""
    noise = np.random.default_rng(seed)
    smooth = Image.fromarray(noise.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize(
        (413, 287), Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(noise.integers(0, 256, (190, 130, 3), dtype=np.uint8))
    alpha = smooth.resize((64, 64)).convert("RGBA")
    alpha.putalpha(_pattern(64, 64).convert("L"))
    cut = smooth.resize((103, 71)).quantize(64)
    cut.info["transparency"] = 7
    return [
        smooth,
        grain,
        smooth.convert("L"),
        smooth.convert("P"),
        smooth.resize((151, 107)).convert("CMYK"),
        alpha,
        cut,
        alpha.convert("LA").resize((97, 58)),
        Image.fromarray(np.add.outer(3 * np.arange(83), 5 * np.arange(61)).astype(np.uint16) % 400),
        _pattern(801, 535),
        _pattern(37, 411),
        _pattern(3, 2),
        Image.new("RGB", (1, 1), (200, 30, 90)),
    ]


def _pattern(width: int, height: int) -> Image.Image:
    """Create ramps with a different slope per channel: compresses well, and any shift changes every pixel."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    channels = (7 * x + 3 * y, 11 * x + 5 * y, 13 * x + 29 * y)
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


@cache
def names_by_language() -> dict[str, Sequence[str]]:
    """Return names of everyday things by language (FLORES-200); fingerprints depend on them."""
    data = json.loads(resources.files("export.parity").joinpath("probes.json").read_text(encoding="utf-8"))
    texts: dict[str, Sequence[str]] = data["texts"]
    return texts
