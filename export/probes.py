"""What every export is compared on: real names in 106 languages, and images of every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

from runtime.manifest import TextPreprocessing

__all__ = ["ProbeText", "names_by_language", "probe_images", "probe_texts"]

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
    "x " * 200,
)
"""Empty, blank, a lone combining mark, two normal forms, a joined emoji, a zero-width space, right to
left, CJK, a spelt-out special token, and a text far over any context length."""


@dataclass(frozen=True, slots=True)
class ProbeText:
    """A text and its language (FLORES-200)."""

    text: str
    language: str


def probe_texts(preprocessing: TextPreprocessing, *, per_language: int) -> list[ProbeText]:
    """Texts in every language that the tower knows and has names here, and awkward ones.

    A language of the tower without names of its own is probed with English ones, so that its token is
    compared too.
    """
    names = names_by_language()
    known = preprocessing.language_ids or names
    probes = [
        ProbeText(text, language)
        for language in sorted(known)
        for text in names.get(language, names["eng_Latn"])[:per_language]
    ]
    any_language = "eng_Latn" if "eng_Latn" in known else next(iter(known))
    return probes + [ProbeText(text, any_language) for text in AWKWARD]


def probe_images(seed: int = 0) -> list[Image.Image]:
    """Seven images: wide, tall, tiny, one pixel; RGB, grey, palette, alpha and CMYK."""
    noise = np.random.default_rng(seed)
    smooth = Image.fromarray(noise.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize(
        (413, 287), Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(noise.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    alpha = smooth.resize((64, 64)).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((64, 64)))
    return [
        smooth,
        grain,
        smooth.convert("L"),
        smooth.convert("P"),
        smooth.convert("CMYK"),
        alpha,
        Image.new("RGB", (1, 1), (200, 30, 90)),
    ]


@cache
def names_by_language() -> dict[str, Sequence[str]]:
    """Names of everyday things by language (FLORES-200); fingerprints are computed of them."""
    data = json.loads(resources.files("export").joinpath("probes.json").read_text(encoding="utf-8"))
    texts: dict[str, Sequence[str]] = data["texts"]
    return texts
