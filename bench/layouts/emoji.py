"""The sample data that comes with the source tree: 1,911 held-out drawings, named in 106 languages."""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

from bench.layouts.retrieval_set import Captions, ImageBytes, RetrievalSet
from runtime.errors import DatasetError

__all__ = ["read_emoji"]

_CREDIT = (
    "Drawings: Twemoji, by Twitter and other contributors, CC BY 4.0. "
    "Names: Unicode CLDR annotations, Unicode License v3."
)


def read_emoji() -> RetrievalSet:
    """Read the sample data: languages are FLORES-200 codes, image keys the emoji themselves.

    Raises:
        DatasetError: ``samples`` cannot be imported: it lies in the source tree and in no wheel.
    """
    try:
        dataset: Any = importlib.import_module("samples.dataset")
    except ImportError as error:
        raise DatasetError(
            f"The emoji samples cannot be imported ({error}). They lie in the source tree, not in the wheel: "
            "run from the root of a checkout, with the bench extra installed."
        ) from error
    drawings = dataset.load_gallery()
    index_of = {drawing.emoji: index for index, drawing in enumerate(drawings)}
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for caption in dataset.load_captions():
        found[caption.flores].append((caption.text, index_of[caption.emoji]))
    captions = []
    for code in sorted(found):
        texts, image_of = zip(*found[code], strict=True)
        captions.append(Captions(code, code, texts, image_of))
    images = tuple(ImageBytes(drawing.emoji, drawing.png) for drawing in drawings)
    note = "Emoji samples: the drawings are held out; training saw the names with another vendor's."
    return RetrievalSet("emoji", images, tuple(captions), (note,), _CREDIT)
