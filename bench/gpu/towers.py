"""Full-size towers that are timed, the shapes of their inputs, and a floor under each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Modality
from runtime.preprocessing.buckets import GPU_BATCH_TOKENS

__all__ = [
    "CAPTIONS",
    "DRY_SHAPES",
    "DRY_TOWERS",
    "TOWERS",
    "TimedShape",
    "TimedTower",
    "n_tokens",
    "random_inputs",
    "shapes_of",
    "tower_of",
]

CAPTIONS = "captions"
"""Load of a window of captions, in tables and records."""

_PAD_ID = 1
_IMAGE_SIDE = 224


@dataclass(frozen=True, slots=True)
class TimedTower:
    """Published tower with random weights, and what PyTorch needs to make the same one.

    Attributes:
        name: Name in tables.
        slug: Name of its files.
        variant: Published variant, or a sample's name in a dry run.
        architecture: ``vit``, ``xlm-roberta`` or ``m2m``.
        layers: Encoder layers.
        width: Width of the hidden states.
        dim: Width of the embedding.
        vocabulary: Tokens; 0 for images.
        patch: Side of an image's patch, in pixels; 0 for texts.
        image_side: Side of an image, in pixels.
        head: Width of an attention head.
        activation: Function between the products of a layer, by its name in transformers: ``gelu`` (with
            the error function), ``quick_gelu`` or ``relu``.
    """

    name: str
    slug: str
    variant: str
    architecture: str
    layers: int
    width: int
    dim: int
    vocabulary: int = 0
    patch: int = 0
    image_side: int = _IMAGE_SIDE
    head: int = 64
    activation: str = "gelu"

    @property
    def modality(self) -> Modality:
        """Modality of the input."""
        return Modality.TEXT if self.vocabulary else Modality.IMAGE

    def operations(self, shape: TimedShape) -> float:
        """Count the multiplications and additions of all matrix products, attention's included, for a shape.

        The last layer is counted in full.
        """
        tokens = shape.tokens or (self.image_side // self.patch) ** 2 + 1
        layer = 2 * tokens * 12 * self.width**2 + 4 * tokens**2 * self.width
        patches = 2 * (tokens - 1) * 3 * self.patch**2 * self.width
        return shape.rows * (self.layers * layer + patches + 2 * self.width * self.dim)

    @property
    def product_weights(self) -> int:
        """Number of weights that every run reads: all matrices but the token table."""
        return self.layers * 12 * self.width**2 + 3 * self.patch**2 * self.width + self.width * self.dim


@dataclass(frozen=True, slots=True)
class TimedShape:
    """Rows of a run and, for texts, tokens of each row; ``ragged`` texts are half as long on average."""

    rows: int
    tokens: int = 0
    ragged: bool = False

    def __str__(self) -> str:
        text = f"{self.rows}×{self.tokens}" if self.tokens else str(self.rows)
        return f"{text} ragged" if self.ragged else text


TOWERS = (
    TimedTower("ViT-B/32", "vit-b32", "xlm-roberta-base-ViT-B-32", "vit", 12, 768, 512, patch=32),
    TimedTower(
        "XLM-R base",
        "xlmr-base",
        "xlm-roberta-base-ViT-B-32",
        "xlm-roberta",
        12,
        768,
        512,
        vocabulary=250_002,
    ),
    TimedTower("ViT-L/14", "vit-l14", "AltCLIP", "vit", 24, 1_024, 768, patch=14, activation="quick_gelu"),
    TimedTower("XLM-R large", "xlmr-large", "AltCLIP", "xlm-roberta", 24, 1_024, 768, vocabulary=250_002),
    TimedTower(
        "NLLB-600M",
        "nllb-600m",
        "nllb-clip-base",
        "m2m",
        12,
        1_024,
        512,
        vocabulary=256_206,
        activation="relu",
    ),
)
"""In order of worth: the first are timed even if the time runs out."""

DRY_TOWERS = (
    TimedTower("tiny ViT", "tiny-vit", "capivara", "vit", 4, 192, 128, patch=8, image_side=64, head=32),
    TimedTower("tiny XLM-R", "tiny-xlmr", "capivara", "xlm-roberta", 2, 64, 128, vocabulary=28_002, head=16),
)
"""Towers of a sample, for a dry run."""

_ROWS = (1, 32, 512, 8, 128)
_TOKENS = (16, 64)

SHAPES: Mapping[Modality, tuple[TimedShape, ...]] = {
    Modality.IMAGE: tuple(TimedShape(rows) for rows in _ROWS),
    Modality.TEXT: (
        *(TimedShape(min(rows, GPU_BATCH_TOKENS // tokens), tokens) for rows in _ROWS for tokens in _TOKENS),
        TimedShape(GPU_BATCH_TOKENS // 64, 64, ragged=True),
    ),
}
"""Shapes by modality, in order of worth; each is one run of the product, which cuts larger batches."""

DRY_SHAPES: Mapping[Modality, tuple[TimedShape, ...]] = {
    Modality.IMAGE: (TimedShape(1), TimedShape(2)),
    Modality.TEXT: (TimedShape(1, 8), TimedShape(4, 16, ragged=True)),
}


def shapes_of(tower: TimedTower, *, dry: bool) -> tuple[TimedShape, ...]:
    """Return the shapes to time a tower in."""
    return (DRY_SHAPES if dry else SHAPES)[tower.modality]


def tower_of(slug: str) -> TimedTower:
    """Return a tower by the name of its files."""
    (tower,) = [tower for tower in (*TOWERS, *DRY_TOWERS) if tower.slug == slug]
    return tower


def random_inputs(tower: TimedTower, shape: TimedShape, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random inputs: uint8 pixels, or int64 ids and mask."""
    random = np.random.default_rng(seed)
    if tower.modality is Modality.IMAGE:
        side = tower.image_side
        return {"pixels": random.integers(0, 256, (shape.rows, 3, side, side), dtype=np.uint8)}
    ids = random.integers(3, tower.vocabulary, (shape.rows, shape.tokens))
    if shape.ragged:
        lengths = random.integers(1, shape.tokens + 1, shape.rows)
        lengths[0] = shape.tokens
        ids[np.arange(shape.tokens) >= lengths[:, None]] = _PAD_ID
    return {"input_ids": ids, "attention_mask": (ids != _PAD_ID).astype(np.int64)}


def n_tokens(tower: TimedTower, shape: TimedShape) -> int:
    """Return the tokens of a shape's random texts, padding left out; 0 for images."""
    return int(random_inputs(tower, shape)["attention_mask"].sum()) if shape.tokens else 0
