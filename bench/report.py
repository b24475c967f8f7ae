"""What a retrieval run found: figures a language, the verdict, and the JSON record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from bench.environment import Environment
from bench.language_maps import LanguageMap
from bench.layouts import RetrievalSet
from bench.metrics import KS, Agreement, Protocol, Recall
from bench.vectors import Vectors
from runtime.backends import Engine
from runtime.manifest import Precision

__all__ = [
    "MAX_RECALL_DROP",
    "SCHEMA",
    "TIE_MARGIN",
    "Comparison",
    "Direction",
    "Evaluation",
    "LanguageFigures",
    "Limits",
    "ModelFacts",
    "RetrievalReport",
    "TurnedHit",
]

SCHEMA = "babeltower-retrieval/1"
"""Version of the record's layout."""


class Direction(str, Enum):
    """What asks, and what is found."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_TEXT = "image_to_text"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an exported model must hold against PyTorch, in every language.

    Attributes:
        min_cosine: Of any text or image with itself.
        max_recall_drop: Of recall at any k, in either direction; a share.
        tie_margin: A hit that PyTorch itself decides by a smaller difference of scores is a tie: it may turn.
    """

    min_cosine: float
    max_recall_drop: float
    tie_margin: float


MAX_RECALL_DROP: Mapping[Precision, float] = MappingProxyType({Precision.FP32: 0.0})
"""The only place where it is said; the cosine's limit is the exporter's, in ``export/parity.py``."""

TIE_MARGIN = 2e-6
"""Twice the error of an FP32 score: a sum of about a thousand products of unit vectors."""


@dataclass(frozen=True, slots=True)
class TurnedHit:
    """A query that one of the two answers within k and the other does not.

    ``query`` is the index of the caption (text→image) or of the image (image→text); ``margin`` is the
    difference of scores by which PyTorch decides it.
    """

    query: int
    k: int
    reference_hits: bool
    margin: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One language and direction, PyTorch beside the exported model."""

    reference: Recall
    exported: Recall
    top10_overlap: float
    turned: tuple[TurnedHit, ...]

    def drop(self, k: int) -> float:
        """By how much recall at k is lower in the exported model; negative where it is higher."""
        return self.reference.at[k] - self.exported.at[k]

    def drop_beyond_ties(self, k: int, tie_margin: float) -> float:
        """The drop without the hits that were ties; where all were ties, exactly 0.

        Exact for the protocol ``any``; under ``fraction`` a tie counts as a whole query at most.
        """
        ties = [t for t in self.turned if t.k == k and t.margin <= tie_margin]
        lost = sum(t.reference_hits for t in ties) - sum(not t.reference_hits for t in ties)
        drop = self.drop(k) - lost / self.reference.n_queries
        return 0.0 if abs(drop) < 1e-12 else drop


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """One language: ``code`` is the data set's own, ``language`` FLORES-200, ``name`` in English."""

    code: str
    language: str
    name: str
    n_captions: int
    text_to_image: Comparison
    image_to_text: Comparison
    texts: Agreement

    def comparison(self, direction: Direction) -> Comparison:
        """The figures of a direction."""
        return self.text_to_image if direction is Direction.TEXT_TO_IMAGE else self.image_to_text


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What was compared; ``checkpoint`` is the name of the checkpoint's folder, or its hub name."""

    name: str
    family: str
    architecture: str
    licence: str
    dim: int
    fingerprint: str
    checkpoint: str
    engine: Engine
    precision: Precision
    threads: int | None


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """A retrieval run.

    Attributes:
        created: UTC, ISO 8601.
        n_texts: Distinct (text, language) that were embedded.
        unspoken: Codes that were left out because the text tower has no token for them.
        seconds: Wall-clock seconds by stage; not a benchmark of speed.
    """

    model: ModelFacts
    dataset: str
    notes: tuple[str, ...]
    language_map: LanguageMap
    protocol: Protocol
    reference_padding: str
    n_images: int
    n_texts: int
    unspoken: tuple[str, ...]
    languages: tuple[LanguageFigures, ...]
    images: Agreement
    limits: Limits
    seconds: Mapping[str, float]
    environment: Environment
    created: str
    schema: str = SCHEMA

    @property
    def failures(self) -> tuple[str, ...]:
        """What broke a limit, a sentence each; empty where the exported model agrees with PyTorch."""
        found = [_cosine_failure("images", self.images, self.limits)]
        for figures in self.languages:
            found.append(_cosine_failure(f"texts in {figures.code}", figures.texts, self.limits))
            found += [_recall_failure(figures, direction, self.limits) for direction in Direction]
        return tuple(failure for failure in found if failure)

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.failures

    @property
    def n_turned(self) -> int:
        """Hits at k=1, 5 or 10 that turned, over all languages and directions."""
        return sum(len(f.comparison(direction).turned) for f in self.languages for direction in Direction)

    @property
    def n_decisions(self) -> int:
        """How many hits were compared: queries × cut-offs."""
        n_queries = [
            f.comparison(direction).reference.n_queries for f in self.languages for direction in Direction
        ]
        return sum(n_queries) * len(KS)

    @property
    def min_cosine(self) -> float:
        """The lowest cosine of any text or image with itself."""
        return min(self.images.cosine_min, *(figures.texts.cosine_min for figures in self.languages))

    def mean_recall_at(self, direction: Direction, k: int) -> tuple[float, float]:
        """Mean over languages of PyTorch's recall at k, and of the exported model's."""
        chosen = [figures.comparison(direction) for figures in self.languages]
        return _mean([c.reference.at[k] for c in chosen]), _mean([c.exported.at[k] for c in chosen])

    def mean_recall(self, direction: Direction) -> tuple[float, float]:
        """The mean of that over the cut-offs, CAPIVARA's "mean recall"."""
        reference, exported = zip(*(self.mean_recall_at(direction, k) for k in KS), strict=True)
        return _mean(reference), _mean(exported)

    def worst_first(self) -> tuple[LanguageFigures, ...]:
        """Languages by rising text→image recall at 1 of the exported model, then by code."""
        return tuple(sorted(self.languages, key=lambda f: (f.text_to_image.exported.at[1], f.code)))

    def to_json(self) -> str:
        """The record: every field, the verdict, and enough to repeat the run."""
        record = dataclasses.asdict(self)
        record["verdict"] = {"passed": self.passed, "failures": list(self.failures)}
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """A report, with the set (in the evaluated languages) and the vectors it was made from."""

    dataset: RetrievalSet
    reference: Vectors
    exported: Vectors
    report: RetrievalReport


def _cosine_failure(what: str, found: Agreement, limits: Limits) -> str | None:
    if found.cosine_min >= limits.min_cosine:
        return None
    return (
        f"{what}: cosine {found.cosine_min:.8f} at row {found.worst_row}; the limit is {limits.min_cosine}."
    )


def _recall_failure(figures: LanguageFigures, direction: Direction, limits: Limits) -> str | None:
    comparison = figures.comparison(direction)
    drops = {k: comparison.drop_beyond_ties(k, limits.tie_margin) for k in comparison.reference.at}
    strict = limits.max_recall_drop == 0.0
    broken = {k: d for k, d in drops.items() if (abs(d) if strict else d) > limits.max_recall_drop}
    if not broken:
        return None
    parts = ", ".join(
        f"R@{k} {comparison.reference.at[k]:.4f} → {comparison.exported.at[k]:.4f}" for k in broken
    )
    allowed = "equal recall" if strict else f"a drop of at most {limits.max_recall_drop}"
    return f"{figures.code}, {direction.value}: {parts}; the limit is {allowed}, ties aside."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
