"""Example searches: a caption as the query, and the pictures that both models return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.accuracy.retrieval_report import Evaluation
from bench.datasets import Captions
from export.retrieval.comparison import TurnedHit
from export.retrieval.metrics import top_items
from export.retrieval.vectors import Vectors
from runtime.errors import DatasetError

__all__ = [
    "N_ANSWERS",
    "FoundPicture",
    "Search",
    "TurnedSearch",
    "named_searches",
    "sample_searches",
    "turned_searches",
]

N_ANSWERS = 5
_N_SAMPLES = 12


@dataclass(frozen=True, slots=True)
class FoundPicture:
    """Search result: the picture's index and key in the set, its cosine, and its correctness."""

    image: int
    key: str
    score: float
    is_right: bool


@dataclass(frozen=True, slots=True)
class Search:
    """Query with the answers of both models, best first."""

    code: str
    language: str
    text: str
    exported: tuple[FoundPicture, ...]
    reference: tuple[FoundPicture, ...]

    @property
    def agrees(self) -> bool:
        """True if both models return the same pictures in the same order."""
        return [a.image for a in self.exported] == [a.image for a in self.reference]

    @property
    def is_found(self) -> bool:
        """True if the right picture is among the exported model's answers."""
        return any(answer.is_right for answer in self.exported)


@dataclass(frozen=True, slots=True)
class TurnedSearch:
    """Search that only one of the models answers within k; ranks of the right image count from 1."""

    search: Search
    hit: TurnedHit
    image: int
    reference_rank: int
    exported_rank: int


def named_searches(evaluation: Evaluation, wanted: Iterable[tuple[str, str]]) -> tuple[Search, ...]:
    """Search for the captions of given pictures.

    Args:
        wanted: Pairs of a language code and the key of the picture whose caption is the query; languages
            that were not evaluated are left out.

    Raises:
        DatasetError: a picture has no caption in an evaluated language.
    """
    by_code = {captions.code: captions for captions in evaluation.dataset.captions}
    index_of = {image.key: index for index, image in enumerate(evaluation.dataset.images)}
    found = []
    for code, key in wanted:
        if code in by_code:
            captions = by_code[code]
            if index_of.get(key) not in captions.image_of:
                raise DatasetError(f"{evaluation.dataset.name} has no caption of {key!r} in {code}.")
            found.append(_search(evaluation, captions, captions.image_of.index(index_of[key])))
    return tuple(found)


def sample_searches(evaluation: Evaluation) -> tuple[Search, ...]:
    """Return one search in each of up to 12 languages, spread over the set and its pictures."""
    entries = evaluation.dataset.captions
    chosen = np.unique(np.linspace(0, len(entries) - 1, min(_N_SAMPLES, len(entries))).astype(int))
    return tuple(
        _search(evaluation, entries[i], (place * 7919) % len(entries[i].texts))
        for place, i in enumerate(chosen)
    )


def turned_searches(evaluation: Evaluation, n: int = 6) -> tuple[TurnedSearch, ...]:
    """Return the first turned text→image searches, by descending margin.

    A search is turned if only one of PyTorch and the exported model answers it within k.
    """
    by_code = {captions.code: captions for captions in evaluation.dataset.captions}
    turned = [
        (by_code[figures.code], hit)
        for figures in evaluation.report.languages
        for hit in figures.text_to_image.turned
    ]
    turned.sort(key=lambda pair: -pair[1].margin)
    return tuple(_turned_search(evaluation, captions, hit) for captions, hit in turned[:n])


def _turned_search(evaluation: Evaluation, captions: Captions, hit: TurnedHit) -> TurnedSearch:
    image = captions.image_of[hit.query]
    reference, exported = (
        _rank(vectors, captions, hit.query, image) for vectors in (evaluation.reference, evaluation.exported)
    )
    return TurnedSearch(_search(evaluation, captions, hit.query), hit, image, reference, exported)


def _rank(vectors: Vectors, captions: Captions, caption: int, image: int) -> int:
    query = vectors.texts[vectors.index.rows[captions.code][caption]]
    ranked = top_items(query[None], vectors.images, len(vectors.images))[0]
    return int(np.flatnonzero(ranked == image)[0]) + 1


def _search(evaluation: Evaluation, captions: Captions, caption: int) -> Search:
    text = captions.texts[caption]
    right = {i for t, i in zip(captions.texts, captions.image_of, strict=True) if t == text}
    exported, reference = (
        _answers(evaluation, vectors, captions, caption, right)
        for vectors in (evaluation.exported, evaluation.reference)
    )
    return Search(captions.code, captions.language, text, exported, reference)


def _answers(
    evaluation: Evaluation, vectors: Vectors, captions: Captions, caption: int, right: Iterable[int]
) -> tuple[FoundPicture, ...]:
    query = vectors.texts[vectors.index.rows[captions.code][caption]]
    top: Sequence[int] = top_items(query[None], vectors.images, N_ANSWERS)[0].tolist()
    return tuple(
        FoundPicture(i, evaluation.dataset.images[i].key, float(vectors.images[i] @ query), i in right)
        for i in top
    )
