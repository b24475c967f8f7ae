"""Options of exports that measure a part of what is measured by default."""

from __future__ import annotations

from dataclasses import replace

from export.repository import ExportOptions
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet

QUICK = ExportOptions(texts_per_language=1, captions_per_language=0)
"""Nothing of retrieval."""


def few_drawings() -> RetrievalSet:
    """Every ninth drawing, and its names in every language."""
    whole = sample_retrieval_set()
    new_index = {old: new for new, old in enumerate(range(0, len(whole.images), 9))}
    captions = []
    for entry in whole.captions:
        pairs = zip(entry.texts, entry.image_of, strict=True)
        texts, image_of = zip(*((t, new_index[i]) for t, i in pairs if i in new_index), strict=True)
        captions.append(replace(entry, texts=texts, image_of=image_of))
    return replace(whole, images=whole.images[::9], captions=tuple(captions))


FEW = ExportOptions(texts_per_language=1, captions_per_language=24, retrieval_set=few_drawings(), threads=1)
