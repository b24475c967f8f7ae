"""What a classification run found: figures a language, the verdict, and the JSON record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from bench.accuracy.retrieval_report import ModelFacts
from bench.datasets.class_sets import Prompts
from bench.datasets.language_maps import LanguageMap
from bench.records.environment import Environment
from export.retrieval.comparison import Comparison
from export.retrieval.metrics import KS, VectorAgreement
from export.retrieval.verdict import RetrievalLimits, retrieval_failures
from runtime.cosines import lowest

__all__ = ["SCHEMA", "ClassFigures", "ClassificationReport"]

SCHEMA = "babeltower-zeroshot/1"
"""Version of the record's layout."""


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One language.

    Attributes:
        code: The data set's own.
        language: FLORES-200, ``None`` where it has no code.
        name: In English, or the code.
        classification: Accuracy at k is the recall at k of an image that asks for its class.
        texts: Agreement of the classes' vectors, the normalised means of their prompts'.
    """

    code: str
    language: str | None
    name: str
    n_classes: int
    n_images: int
    n_templates: int
    classification: Comparison
    texts: VectorAgreement

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """For the verdict."""
        return {"classification": self.classification}


@dataclass(frozen=True, slots=True)
class ClassificationReport:
    """A classification run.

    Attributes:
        created: UTC, ISO 8601.
        unspoken: Codes that were left out because the text tower has no token for them.
        seconds: Wall-clock seconds by stage; not a benchmark of speed.
    """

    model: ModelFacts
    dataset: str
    prompts: Prompts
    notes: tuple[str, ...]
    language_map: LanguageMap
    reference_padding: str
    n_images: int
    unspoken: tuple[str, ...]
    languages: tuple[ClassFigures, ...]
    images: VectorAgreement
    limits: RetrievalLimits
    seconds: Mapping[str, float]
    environment: Environment
    created: str
    schema: str = SCHEMA

    @property
    def failures(self) -> tuple[str, ...]:
        """What broke a limit, a sentence each; empty where the exported model agrees with PyTorch."""
        return retrieval_failures(self.languages, self.images, self.limits)

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.failures

    @property
    def n_turned(self) -> int:
        """Hits within k=1, 5 or 10 that turned, over all languages."""
        return sum(len(figures.classification.turned) for figures in self.languages)

    @property
    def n_decisions(self) -> int:
        """How many hits were compared: images × cut-offs."""
        return sum(figures.n_images for figures in self.languages) * len(KS)

    @property
    def min_cosine(self) -> float:
        """The lowest cosine of any class or image with itself."""
        return lowest([self.images.cosine_min, *(figures.texts.cosine_min for figures in self.languages)])

    def mean_accuracy_at(self, k: int) -> tuple[float, float]:
        """Mean over languages of PyTorch's accuracy within k, and of the exported model's."""
        found = [figures.classification for figures in self.languages]
        return (
            sum(comparison.reference.at[k] for comparison in found) / len(found),
            sum(comparison.exported.at[k] for comparison in found) / len(found),
        )

    def worst_first(self) -> tuple[ClassFigures, ...]:
        """Languages by rising top-1 accuracy of the exported model, then by code."""
        return tuple(sorted(self.languages, key=lambda f: (f.classification.exported.at[1], f.code)))

    def to_json(self) -> str:
        """The record: every field, the verdict, and enough to repeat the run."""
        record = dataclasses.asdict(self)
        record["verdict"] = {"passed": self.passed, "failures": list(self.failures)}
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
