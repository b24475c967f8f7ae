"""Check retrieval or zero-shot classification results against limits; one sentence per violation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from export.retrieval.comparison import Comparison
from export.retrieval.metrics import KS, VectorAgreement

__all__ = ["ComparedVectors", "RetrievalLimits", "retrieval_failures"]

_STANDARD_ERRORS = 3.0


@dataclass(frozen=True, slots=True)
class RetrievalLimits:
    """Limits on an exported model's retrieval relative to PyTorch's; drops are shares.

    Attributes:
        min_cosine: Minimum cosine of any text or image with PyTorch's vector.
        min_mean_cosine: Minimum mean cosine over a language's texts, or over the images.
        max_recall_drop: Maximum drop of recall at 1 in any language and direction.
        max_later_recall_drop: Maximum drop of recall at 5 and at 10 in any language and direction: more hits
            are near these cut-offs, and the largest of some six hundred drops is mostly noise.
        max_mean_drop: Maximum drop of recall at 1, mean over the languages, in either direction.
        tie_margin: A hit that PyTorch decides by a smaller score difference is a tie, which may change.
        sampled: Only some of a set's captions were used as queries. A language's drop is then an estimate,
            and violates its limit only if it exceeds it by more than three standard errors.
    """

    min_cosine: float
    min_mean_cosine: float
    max_recall_drop: float
    max_later_recall_drop: float
    max_mean_drop: float
    tie_margin: float
    sampled: bool = False


class ComparedVectors(Protocol):
    """Results of one language, PyTorch and the exported model, by direction or task."""

    @property
    def code(self) -> str:
        """Language code of the data set."""

    @property
    def texts(self) -> VectorAgreement:
        """Agreement of the language's text vectors."""

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """Comparisons by name, such as ``text_to_image``; the names are the same in every language."""


def retrieval_failures(
    languages: Sequence[ComparedVectors], images: VectorAgreement, limits: RetrievalLimits
) -> tuple[str, ...]:
    """List the limit violations: means first, then languages by descending drop; empty if all hold."""
    worst_first = sorted(languages, key=_largest_drop, reverse=True)
    return (
        *_mean_failures(languages, limits),
        *_cosine_failures("images", images, limits),
        *(
            failure
            for figures in worst_first
            for failure in (
                *_cosine_failures(f"texts in {figures.code}", figures.texts, limits),
                *(f for name in figures.comparisons for f in _recall_failures(figures, name, limits)),
            )
        ),
    )


def _largest_drop(figures: ComparedVectors) -> float:
    return max(comparison.drop(1) for comparison in figures.comparisons.values())


def _mean_failures(languages: Sequence[ComparedVectors], limits: RetrievalLimits) -> Iterator[str]:
    for name in languages[0].comparisons:
        chosen = [figures.comparisons[name] for figures in languages]
        drop = sum(c.drop_beyond_ties(1, limits.tie_margin) for c in chosen) / len(chosen)
        errors = [_standard_error(c, 1) for c in chosen]
        allowance = _STANDARD_ERRORS * math.sqrt(sum(e * e for e in errors)) / len(errors)
        if drop > limits.max_mean_drop + (allowance if limits.sampled else 0.0) + 1e-12:
            reference, exported = (
                sum(recall.at[1] for recall in recalls) / len(chosen)
                for recalls in ([c.reference for c in chosen], [c.exported for c in chosen])
            )
            yield (
                f"mean over {len(chosen)} languages, {name}: R@1 {reference:.4f} → "
                f"{exported:.4f}; the limit is a drop of at most {limits.max_mean_drop}."
            )


def _cosine_failures(what: str, found: VectorAgreement, limits: RetrievalLimits) -> Iterator[str]:
    if not found.cosine_min >= limits.min_cosine:
        undefined = " (a vector that is zero or not finite)" if math.isnan(found.cosine_min) else ""
        yield (
            f"{what}: cosine {found.cosine_min:.8f} at row {found.worst_row}{undefined}; "
            f"the limit is {limits.min_cosine}."
        )
    if not found.cosine_mean >= limits.min_mean_cosine:
        yield f"{what}: mean cosine {found.cosine_mean:.6f}; the limit is {limits.min_mean_cosine}."


def _recall_failures(figures: ComparedVectors, name: str, limits: RetrievalLimits) -> Iterator[str]:
    comparison = figures.comparisons[name]
    strict = limits.max_recall_drop == 0.0
    most = {k: limits.max_recall_drop if k == 1 else limits.max_later_recall_drop for k in KS}
    broken = []
    for k in comparison.reference.at:
        drop = comparison.drop_beyond_ties(k, limits.tie_margin)
        allowance = (
            _STANDARD_ERRORS * _standard_error(comparison, k) if limits.sampled and not strict else 0.0
        )
        if (abs(drop) if strict else drop) > most[k] + (0.0 if strict else allowance):
            broken.append(k)
    if broken:
        parts = ", ".join(
            f"R@{k} {comparison.reference.at[k]:.4f} → {comparison.exported.at[k]:.4f}" for k in broken
        )
        allowed = "equal recall" if strict else f"a drop of at most {most[broken[0]]}"
        yield f"{figures.code}, {name}: {parts}; the limit is {allowed}, ties aside."


def _standard_error(comparison: Comparison, k: int) -> float:
    """Return the standard error of a drop estimated on a sample of queries."""
    # Each changed hit adds ±1 to a sum of n queries; if up and down are equally likely, its variance is 1.
    return math.sqrt(sum(t.k == k for t in comparison.turned)) / comparison.reference.n_queries
