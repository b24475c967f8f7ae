"""Report of a classification run: figures per language, verdict, and JSON record."""

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
    """Figures of one language.

    Attributes:
        code: Language code of the data set.
        language: FLORES-200 code, or ``None`` if there is none.
        name: English name, or the code.
        classification: Accuracy at k: recall at k with an image as the query and its class as the answer.
        texts: Agreement of the class vectors, the normalised means over the class's prompts.
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
        """Comparisons that the verdict checks, by name."""
        return {"classification": self.classification}


@dataclass(frozen=True, slots=True)
class ClassificationReport:
    """Report of a classification run.

    Attributes:
        created: Time of creation, UTC in ISO 8601.
        unspoken: Codes left out because the text tower has no token for them.
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
        """Exceeded limits, one sentence each; empty if the exported model agrees with PyTorch."""
        return retrieval_failures(self.languages, self.images, self.limits)

    @property
    def passed(self) -> bool:
        """True if every limit holds."""
        return not self.failures

    @property
    def n_turned(self) -> int:
        """Number of turned hits at k=1, 5 or 10, over all languages."""
        return sum(len(figures.classification.turned) for figures in self.languages)

    @property
    def n_decisions(self) -> int:
        """Number of compared hits: images × cut-offs."""
        return sum(figures.n_images for figures in self.languages) * len(KS)

    @property
    def min_cosine(self) -> float:
        """Lowest cosine of any class or image vector to PyTorch's."""
        return lowest([self.images.cosine_min, *(figures.texts.cosine_min for figures in self.languages)])

    def mean_accuracy_at(self, k: int) -> tuple[float, float]:
        """Return the mean accuracy at k over languages, PyTorch's and the exported model's."""
        found = [figures.classification for figures in self.languages]
        return (
            sum(comparison.reference.at[k] for comparison in found) / len(found),
            sum(comparison.exported.at[k] for comparison in found) / len(found),
        )

    def worst_first(self) -> tuple[ClassFigures, ...]:
        """Return the languages by ascending top-1 accuracy of the exported model, then by code."""
        return tuple(sorted(self.languages, key=lambda f: (f.classification.exported.at[1], f.code)))

    def to_json(self) -> str:
        """Return the record as JSON: every field, the verdict, and enough to repeat the run."""
        record = dataclasses.asdict(self)
        record["verdict"] = {"passed": self.passed, "failures": list(self.failures)}
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
