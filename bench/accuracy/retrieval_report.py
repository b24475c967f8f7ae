"""Report of a retrieval run: figures per language, verdict, and JSON record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.datasets import RetrievalSet
from bench.datasets.language_maps import LanguageMap
from bench.records.environment import Environment
from export.retrieval.comparison import Direction, LanguageFigures
from export.retrieval.metrics import KS, RetrievalProtocol, VectorAgreement
from export.retrieval.vectors import Vectors
from export.retrieval.verdict import RetrievalLimits, retrieval_failures
from runtime.cosines import lowest
from runtime.manifest import Engine, Precision

__all__ = [
    "SCHEMA",
    "Evaluation",
    "ModelFacts",
    "RetrievalReport",
]

SCHEMA = "babeltower-retrieval/1"
"""Version of the record's layout."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Compared model; ``checkpoint`` is the name of the checkpoint's folder, or its hub name."""

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
    """Report of a retrieval run.

    Attributes:
        created: Time of creation, UTC in ISO 8601.
        n_texts: Number of distinct (text, language) pairs that were embedded.
        unspoken: Codes left out because the text tower has no token for them.
        seconds: Wall-clock seconds by stage; not a benchmark of speed.
    """

    model: ModelFacts
    dataset: str
    notes: tuple[str, ...]
    language_map: LanguageMap
    protocol: RetrievalProtocol
    reference_padding: str
    n_images: int
    n_texts: int
    unspoken: tuple[str, ...]
    languages: tuple[LanguageFigures, ...]
    images: VectorAgreement
    limits: RetrievalLimits
    seconds: Mapping[str, float]
    environment: Environment
    created: str
    schema: str = SCHEMA

    @property
    def failures(self) -> tuple[str, ...]:
        """Exceeded limits, one sentence each; empty if the exported model agrees with PyTorch."""
        return retrieval_failures(self.languages, self.images, self.limits)

    @property
    def passed(self) -> bool:
        """True if every limit holds."""
        return not self.failures

    @property
    def n_turned(self) -> int:
        """Number of turned hits at k=1, 5 or 10, over all languages and directions."""
        return sum(len(f.comparison(direction).turned) for f in self.languages for direction in Direction)

    @property
    def n_decisions(self) -> int:
        """Number of compared hits: queries × cut-offs."""
        n_queries = [
            f.comparison(direction).reference.n_queries for f in self.languages for direction in Direction
        ]
        return sum(n_queries) * len(KS)

    @property
    def min_cosine(self) -> float:
        """Lowest cosine of any text or image vector to PyTorch's."""
        return lowest([self.images.cosine_min, *(figures.texts.cosine_min for figures in self.languages)])

    def mean_recall_at(self, direction: Direction, k: int) -> tuple[float, float]:
        """Return the mean recall at k over languages, PyTorch's and the exported model's."""
        chosen = [figures.comparison(direction) for figures in self.languages]
        return _mean([c.reference.at[k] for c in chosen]), _mean([c.exported.at[k] for c in chosen])

    def mean_recall(self, direction: Direction) -> tuple[float, float]:
        """Return ``mean_recall_at`` averaged over the cut-offs, CAPIVARA's "mean recall"."""
        reference, exported = zip(*(self.mean_recall_at(direction, k) for k in KS), strict=True)
        return _mean(reference), _mean(exported)

    def worst_first(self) -> tuple[LanguageFigures, ...]:
        """Return the languages by ascending text→image R@1 of the exported model, then by code."""
        return tuple(sorted(self.languages, key=lambda f: (f.text_to_image.exported.at[1], f.code)))

    def to_json(self) -> str:
        """Return the record as JSON: every field, the verdict, and enough to repeat the run."""
        record = dataclasses.asdict(self)
        record["verdict"] = {"passed": self.passed, "failures": list(self.failures)}
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Report with its data set (evaluated languages only) and vectors."""

    dataset: RetrievalSet
    reference: Vectors
    exported: Vectors
    report: RetrievalReport


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
