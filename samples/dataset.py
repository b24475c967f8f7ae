"""Read the sample data: emoji names in 106 languages, drawings to train on, and a held-out gallery.

Needs pyarrow and pillow only.

    from samples import dataset
    gallery = dataset.load_gallery()            # 1,911 drawings, never trained on
    captions = dataset.load_captions("por_Latn")  # their Portuguese names
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "emoji"


@dataclass(frozen=True, slots=True)
class Caption:
    """One emoji's name in one language.

    Attributes:
        emoji: The characters; the key shared with ``Drawing``.
        flores: Language as in FLORES-200, for example ``por_Latn``.
        bcp47: Language as a BCP-47 tag, for example ``pt``.
        text: The name.
    """

    emoji: str
    flores: str
    bcp47: str
    text: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """One vendor's drawing of one emoji.

    Attributes:
        code_points: Hexadecimal code points joined by ``-``: fit for a file name.
        category: Unicode's group, for example ``Food & Drink``.
        vendor: ``noto`` (training) or ``twemoji`` (held out).
        png: The encoded image, 64 × 64, on white, opaque.
    """

    emoji: str
    code_points: str
    category: str
    vendor: str
    png: bytes

    def image(self) -> Image.Image:
        """Decode to an RGB image, 64 × 64."""
        return Image.open(io.BytesIO(self.png), formats=("PNG",)).convert("RGB")


def load_captions(flores: str | None = None) -> list[Caption]:
    """Captions of one language, or of all: ordered by language, then as the drawings are ordered.

    A few languages name fewer than all emoji, so join a caption to its drawing by ``emoji``, not by position.

    Raises:
        KeyError: no caption is in that language.
    """
    filters = None if flores is None else [("flores", "=", flores)]
    columns = pq.read_table(FOLDER / "captions.parquet", filters=filters).to_pydict()
    rows = zip(columns["emoji"], columns["flores"], columns["bcp47"], columns["caption"], strict=True)
    captions = [Caption(*row) for row in rows]
    if not captions:
        raise KeyError(f"No caption is in {flores!r}; the sample data has {languages()}")
    return captions


def load_gallery() -> list[Drawing]:
    """The 1,911 held-out drawings, in Unicode's order."""
    return _load_drawings("gallery.parquet")


def load_training_images() -> list[Drawing]:
    """The 1,911 drawings that the sample checkpoints were trained on, in Unicode's order."""
    return _load_drawings("train.parquet")


def languages() -> list[str]:
    """The 106 languages with captions, as sorted FLORES-style codes."""
    column = pq.read_table(FOLDER / "captions.parquet", columns=["flores"])["flores"]
    return sorted(column.unique().to_pylist())


def _load_drawings(name: str) -> list[Drawing]:
    rows = pq.read_table(FOLDER / name).to_pylist()
    return [Drawing(r["emoji"], r["code_points"], r["category"], r["vendor"], r["image"]) for r in rows]
