"""Two embeddings of one set → the figures of each language."""

from __future__ import annotations

import numpy as np

from bench.language_maps import english_name
from bench.layouts import Captions, RetrievalSet
from bench.metrics import (
    KS,
    Float,
    Int,
    Protocol,
    Relevance,
    agreement,
    any_hits,
    decision_margins,
    recall,
    top_items,
    top_overlap,
)
from bench.report import Comparison, LanguageFigures, TurnedHit
from bench.vectors import Vectors

__all__ = ["compare_language", "compare_retrieval"]


def compare_language(
    dataset: RetrievalSet, captions: Captions, reference: Vectors, exported: Vectors, protocol: Protocol
) -> LanguageFigures:
    """Retrieve in both directions with both embeddings.

    Source:
        Ranking, ties and protocols: ``bench/metrics.py``.
    """
    texts = reference.of(captions), exported.of(captions)
    images = reference.images, exported.images
    relevance = dataset.relevance(captions)
    return LanguageFigures(
        code=captions.code,
        language=captions.language,
        name=english_name(captions.language),
        n_captions=len(captions.texts),
        text_to_image=compare_retrieval(texts, images, relevance, protocol),
        image_to_text=compare_retrieval(images, texts, relevance.reversed(), protocol),
        texts=agreement(*texts),
    )


def compare_retrieval(
    queries: tuple[Float, Float], items: tuple[Float, Float], relevance: Relevance, protocol: Protocol
) -> Comparison:
    """Compare one direction.

    Args:
        queries: The reference's and the exported model's, float32 (n_queries, dim) each.
        items: The same of the items.
    """
    reference_top = top_items(queries[0], items[0])
    exported_top = top_items(queries[1], items[1])
    return Comparison(
        reference=recall(reference_top, relevance, protocol),
        exported=recall(exported_top, relevance, protocol),
        top10_overlap=top_overlap(reference_top, exported_top),
        turned=_turned(queries[0], items[0], relevance, reference_top, exported_top),
    )


def _turned(
    queries: Float, items: Float, relevance: Relevance, reference_top: Int, exported_top: Int
) -> tuple[TurnedHit, ...]:
    found: list[TurnedHit] = []
    for k in KS:
        hits = any_hits(reference_top, relevance, k)
        rows = np.flatnonzero(hits != any_hits(exported_top, relevance, k))
        margins = decision_margins(queries, items, relevance, rows, k)
        found += [
            TurnedHit(int(row), k, bool(hits[row]), float(margin))
            for row, margin in zip(rows, margins, strict=True)
        ]
    return tuple(found)
