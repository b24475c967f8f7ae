"""Measure what a pruned vocabulary costs: texts that need a dropped token, and their retrieval in PyTorch.

The cost does not depend on the precision, so that it is measured once, by the family's own library, on the
retrieval set of the gate: with the whole vocabulary and with the kept part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.parity.gate import GateReference
from export.parity.limits import limits_of
from export.retrieval.comparison import LanguageFigures, compare_language
from export.retrieval.metrics import RetrievalProtocol
from export.retrieval.vectors import TextIndex, Vectors, reference_text_vectors, silent
from export.retrieval.verdict import retrieval_failures
from export.towers import Float, Towers
from export.vocabulary.pruned_towers import PrunedReference
from runtime.errors import ParityError
from runtime.manifest import Engine, Precision

__all__ = ["VocabularyLoss", "vocabulary_loss"]

_LIMITS = limits_of(Precision.INT8, Engine.ONNXRUNTIME)
"""A pruned vocabulary may cost the recall that INT8 may."""


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """Retrieval with the whole vocabulary and with the kept part, by language.

    Attributes:
        dataset: Name of the retrieval set.
        n_needing: Distinct texts that need a dropped token, of ``n_texts``, by language code.
        languages: Comparison of each language.
        sampled: Only some of the set's captions were used.
    """

    dataset: str
    n_texts: Mapping[str, int]
    n_needing: Mapping[str, int]
    languages: tuple[LanguageFigures, ...]
    sampled: bool

    def require_small(self, accept_drop: float | None) -> None:
        """Check that recall falls by no more than INT8 may cost.

        Args:
            accept_drop: Recall drop, as a share, to accept beyond these limits.

        Raises:
            ParityError: it falls further in a language, or in the mean.
        """
        limits = _LIMITS if accept_drop is None else _LIMITS.accepting(accept_drop)
        if self.sampled:
            limits = limits.for_a_sample()
        # cosines are not limited: a text that lost its tokens may have quite another vector
        retrieval = dataclasses.replace(limits.retrieval, min_cosine=-1.0, min_mean_cosine=-1.0)
        failures = retrieval_failures(self.languages, self.languages[0].texts, retrieval)
        if failures:
            raise ParityError(
                f"The kept part of the vocabulary costs too much recall, even in PyTorch: {failures[0]} "
                f"{sum(self.n_needing.values())} of {sum(self.n_texts.values())} texts need "
                "a dropped token. Name texts of every language with --vocabulary-texts, keep the vocabulary "
                "by characters, or pass --accept-drop."
            )

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the manifest: counts by language, and recall where texts need more."""
        figures = {found.code: found for found in self.languages}
        return {
            self.dataset: {
                code: {
                    "n_texts": n_texts,
                    "n_needing": self.n_needing[code],
                    **(dict(_recalls(figures[code])) if self.n_needing[code] else {}),
                }
                for code, n_texts in self.n_texts.items()
            }
        }


def _recalls(figures: LanguageFigures) -> Iterator[tuple[str, dict[str, float]]]:
    for name, found in figures.comparisons.items():
        yield name, {"whole": found.reference.at[1], "pruned": found.exported.at[1]}


def vocabulary_loss(towers: Towers, gate: GateReference) -> VocabularyLoss:
    """Compare retrieval with the kept part of the vocabulary to that with all of it, both in PyTorch.

    Args:
        towers: Towers with a pruned vocabulary.
        gate: The reference's vectors with the kept part.
    """
    reference = towers.reference
    assert isinstance(reference, PrunedReference)
    index = gate.index
    needing = reference.needs_dropped(index.texts, index.languages)
    whole = _whole_vectors(reference, index, needing, gate.vectors.texts, gate.dim, towers)
    before = Vectors(gate.vectors.images, whole, index)
    counts = {code: needing[np.unique(rows)] for code, rows in index.rows.items()}
    return VocabularyLoss(
        dataset=gate.dataset.name,
        n_texts={code: len(rows) for code, rows in counts.items()},
        n_needing={code: int(rows.sum()) for code, rows in counts.items()},
        languages=tuple(
            compare_language(gate.dataset, captions, before, gate.vectors, RetrievalProtocol.ANY)
            for captions in gate.dataset.captions
        ),
        sampled=gate.sampled,
    )


def _whole_vectors(
    reference: PrunedReference, index: TextIndex, needing: Any, pruned: Float, dim: int, towers: Towers
) -> Float:
    """Return the texts' vectors with the whole vocabulary; those of texts that need no more are the same."""
    rows = np.flatnonzero(needing)
    whole = pruned.copy()
    if len(rows):
        asked = TextIndex(
            tuple(index.texts[row] for row in rows), tuple(index.languages[row] for row in rows), {}
        )
        whole[rows] = reference_text_vectors(
            reference.library,
            asked,
            dim=dim,
            text=towers.whole.text_preprocessing,
            progress=silent,
        )
    return whole
