"""Read published retrieval and classification sets from a local folder; nothing is downloaded.

Each file has one layout, a function that reads a ``RetrievalSet`` or a ``ClassificationSet``; ``LAYOUTS`` and
``CLASS_LAYOUTS`` register them by name.
"""

from __future__ import annotations

from bench.datasets.class_registry import CLASS_LAYOUTS, read_classes
from bench.datasets.registry import LAYOUTS, ReadOptions, read
from export.retrieval.sets import (
    CaptionChoice,
    Captions,
    ImageBytes,
    ImageOnDisk,
    ImageSource,
    MissingImages,
    RetrievalSet,
    TarSlice,
    Translator,
)

__all__ = [
    "CLASS_LAYOUTS",
    "LAYOUTS",
    "CaptionChoice",
    "Captions",
    "ImageBytes",
    "ImageOnDisk",
    "ImageSource",
    "MissingImages",
    "ReadOptions",
    "RetrievalSet",
    "TarSlice",
    "Translator",
    "read",
    "read_classes",
]
