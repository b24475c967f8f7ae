"""Compare the retrieval of two embeddings of the same set, per language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from export.retrieval.metrics import (
    KS,
    Float,
    Int,
    Recall,
    Relevance,
    RetrievalProtocol,
    VectorAgreement,
    agreement,
    any_hits,
    decision_margins,
    recall,
    top_items,
    top_overlap,
)
from export.retrieval.sets import Captions, RetrievalSet
from export.retrieval.vectors import Vectors
from runtime.preprocessing.languages import english_name

__all__ = [
    "Comparison",
    "Direction",
    "LanguageFigures",
    "TurnedHit",
    "compare_language",
    "compare_retrieval",
]


class Direction(str, Enum):
    """Direction of retrieval: the queries and the items found."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_TEXT = "image_to_text"


@dataclass(frozen=True, slots=True)
class TurnedHit:
    """Query that only one of the two models answers within the top k.

    ``query`` is the index of the caption (text→image) or of the image (image→text); ``margin`` is the score
    difference that decides the hit in PyTorch.
    """

    query: int
    k: int
    reference_hits: bool
    margin: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Retrieval of PyTorch and of the exported model, for one language and direction."""

    reference: Recall
    exported: Recall
    top10_overlap: float
    turned: tuple[TurnedHit, ...]

    def drop(self, k: int) -> float:
        """Return the drop of recall at k in the exported model; negative if recall increased."""
        return self.reference.at[k] - self.exported.at[k]

    def drop_beyond_ties(self, k: int, tie_margin: float) -> float:
        """Return the drop without hits decided by ties; exactly 0 if all were ties.

        Exact for the protocol ``any``; under ``fraction`` a tie may count as a whole query.
        """
        ties = [t for t in self.turned if t.k == k and t.margin <= tie_margin]
        lost = sum(t.reference_hits for t in ties) - sum(not t.reference_hits for t in ties)
        drop = self.drop(k) - lost / self.reference.n_queries
        return 0.0 if abs(drop) < 1e-12 else drop


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """Results of one language: ``code`` as in the data set, ``language`` FLORES-200, ``name`` in English."""

    code: str
    language: str
    name: str
    n_captions: int
    text_to_image: Comparison
    image_to_text: Comparison
    texts: VectorAgreement

    def comparison(self, direction: Direction) -> Comparison:
        """Return the results of a direction."""
        return self.text_to_image if direction is Direction.TEXT_TO_IMAGE else self.image_to_text

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """Results by the name of the direction."""
        return {direction.value: self.comparison(direction) for direction in Direction}


def compare_language(
    dataset: RetrievalSet,
    captions: Captions,
    reference: Vectors,
    exported: Vectors,
    protocol: RetrievalProtocol,
) -> LanguageFigures:
    """Compare the two embeddings' retrieval in both directions.

    Source:
        Ranking, ties and protocols: ``export/retrieval/metrics.py``.
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
    queries: tuple[Float, Float],
    items: tuple[Float, Float],
    relevance: Relevance,
    protocol: RetrievalProtocol,
) -> Comparison:
    """Compare one direction of retrieval.

    Args:
        queries: Query vectors of the reference and of the exported model, float32 (n_queries, dim) each.
        items: Item vectors of both, in the same form.
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
