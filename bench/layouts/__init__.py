"""Read published retrieval sets from a local folder; nothing is downloaded.

One file a layout, each a function that reads a ``RetrievalSet``; ``LAYOUTS`` registers them by name.
"""

from __future__ import annotations

from bench.layouts.registry import LAYOUTS, ReadOptions, read
from export.retrieval.sets import (
    CaptionChoice,
    Captions,
    ImageBytes,
    ImageFile,
    ImageSource,
    MissingImages,
    RetrievalSet,
    TarSlice,
    Translator,
)

__all__ = [
    "LAYOUTS",
    "CaptionChoice",
    "Captions",
    "ImageBytes",
    "ImageFile",
    "ImageSource",
    "MissingImages",
    "ReadOptions",
    "RetrievalSet",
    "TarSlice",
    "Translator",
    "read",
]
