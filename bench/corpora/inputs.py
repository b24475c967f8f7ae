"""Inputs of the full-size corpus benchmark: captions, generated texts, photographs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samples import dataset

__all__ = ["CORPORA", "LANGUAGE", "photographs", "texts_of"]

CORPORA = ("captions", "generated")
LANGUAGE = "eng_Latn"


def texts_of(corpus: str, n: int, *, seed: int = 0) -> list[str]:
    """Return ``n`` random texts: CLDR captions of all 106 languages, or generated ones."""
    if corpus == "generated":
        return _generated_texts(n, seed)
    captions = [caption.text for caption in dataset.load_captions()]
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[i] for i in order[:n]]


def _generated_texts(n: int, seed: int) -> list[str]:
    """Return texts as long as captions of photographs: about 16 tokens, with a long tail."""
    random = np.random.default_rng(seed)
    words = [word for caption in dataset.load_captions(LANGUAGE) for word in caption.text.split()]
    lengths = np.clip(random.lognormal(2.2, 0.6, n), 2, 60).astype(int)
    return [" ".join(random.choice(words, length)) for length in lengths]


def photographs(folder: Path, n: int, *, seed: int = 0) -> None:
    """Write JPEGs of 640×480 with the detail, and roughly the size, of photographs."""
    from PIL import Image

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        levels: NDArray[Any] = random.normal(128, 9, (480, 640, 3))
        for side in (4, 16, 64, 160):
            small = random.normal(0, 22, (480 // side + 1, 640 // side + 1, 3))
            levels += np.kron(small, np.ones((side, side, 1)))[:480, :640]
        file = io.BytesIO()
        Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        (folder / f"{i:05d}.jpg").write_bytes(file.getvalue())
