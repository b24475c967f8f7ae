"""Sample retrieval set of the project: 1,911 held-out drawings with names in 106 languages."""

from __future__ import annotations

from pathlib import Path

from export.precision.calibration import columns_of_parquet, samples_folder
from export.retrieval.sets import Captions, ImageBytes, RetrievalSet

__all__ = ["sample_retrieval_set"]

_CREDIT = (
    "Drawings: Twemoji, by Twitter and other contributors, CC BY 4.0. "
    "Names: Unicode CLDR annotations, Unicode License v3."
)
_NOTE = "Emoji samples: the drawings are held out; training saw the names with another vendor's."


def sample_retrieval_set(folder: Path | None = None) -> RetrievalSet:
    """Read the sample set; languages are FLORES-200 codes, image keys are the emoji.

    Args:
        folder: Folder with ``captions.parquet`` and ``gallery.parquet``; ``samples_folder()`` by default.

    Raises:
        DatasetError: the files are missing or cannot be read.
    """
    folder = folder or samples_folder()
    drawings = columns_of_parquet(folder / "gallery.parquet", ("emoji", "image"))
    captions = columns_of_parquet(folder / "captions.parquet", ("emoji", "flores", "caption"))
    index_of = {emoji: index for index, emoji in enumerate(drawings["emoji"])}
    found: dict[str, list[tuple[str, int]]] = {}
    for emoji, flores, caption in zip(*captions.values(), strict=True):
        found.setdefault(flores, []).append((caption, index_of[emoji]))
    entries = []
    for code in sorted(found):
        texts, image_of = zip(*found[code], strict=True)
        entries.append(Captions(code, code, texts, image_of))
    images = tuple(
        ImageBytes(key, png) for key, png in zip(drawings["emoji"], drawings["image"], strict=True)
    )
    return RetrievalSet("emoji", images, tuple(entries), (_NOTE,), _CREDIT)
