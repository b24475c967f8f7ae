"""Read the sample data: emoji names in 106 languages, drawings to train on, and a held-out gallery.

Requires only pyarrow and pillow.

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
    """Name of one emoji in one language.

    Attributes:
        emoji: Emoji characters; the key shared with ``Drawing``.
        flores: FLORES-200 code of the language, for example ``por_Latn``.
        bcp47: BCP-47 tag of the language, for example ``pt``.
        text: Name of the emoji.
    """

    emoji: str
    flores: str
    bcp47: str
    text: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """Drawing of one emoji by one vendor.

    Attributes:
        code_points: Hexadecimal code points joined by ``-``, usable as a file name.
        category: Unicode group, for example ``Food & Drink``.
        vendor: ``noto`` (training) or ``twemoji`` (held out).
        png: Encoded image, 64 × 64, opaque on white.
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
    """Load the captions of one language or of all, sorted by language, then in the order of the drawings.

    Some languages lack names for a few emoji, so match captions and drawings by ``emoji``, not by position.

    Raises:
        KeyError: there are no captions in that language.
    """
    filters = None if flores is None else [("flores", "=", flores)]
    columns = pq.read_table(FOLDER / "captions.parquet", filters=filters).to_pydict()
    rows = zip(columns["emoji"], columns["flores"], columns["bcp47"], columns["caption"], strict=True)
    captions = [Caption(*row) for row in rows]
    if not captions:
        raise KeyError(f"There are no captions in {flores!r}; the sample data has {languages()}")
    return captions


def load_gallery() -> list[Drawing]:
    """Load the 1,911 held-out drawings, in Unicode order."""
    return _load_drawings("gallery.parquet")


def load_training_images() -> list[Drawing]:
    """Load the 1,911 drawings that the sample checkpoints were trained on, in Unicode order."""
    return _load_drawings("train.parquet")


def languages() -> list[str]:
    """Return the 106 languages with captions, as sorted FLORES-200 codes."""
    column = pq.read_table(FOLDER / "captions.parquet", columns=["flores"])["flores"]
    return sorted(column.unique().to_pylist())


def _load_drawings(name: str) -> list[Drawing]:
    rows = pq.read_table(FOLDER / name).to_pylist()
    return [Drawing(r["emoji"], r["code_points"], r["category"], r["vendor"], r["image"]) for r in rows]
