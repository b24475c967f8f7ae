"""Retrieval gate: compare a variant's retrieval with PyTorch's, per language and direction.

The probes of ``export/parity/measure.py`` compare individual vectors; a lower precision changes all of them
slightly, and only retrieval shows the cost. The reference's vectors are computed once for all variants of an
export, and again for some languages with other batch sizes: the difference between the two is the noise
floor, which no variant can improve on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.retrieval.comparison import Comparison, Direction, LanguageFigures, compare_language
from export.retrieval.metrics import RetrievalProtocol, VectorAgreement, agreement
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import (
    Progress,
    TextIndex,
    Vectors,
    exported_vectors,
    reference_vectors,
    spoken_part,
)
from export.towers import Towers
from runtime.cosines import lowest
from runtime.device import Device
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Precision
from runtime.opening.tower_check import Checks

__all__ = [
    "GateReference",
    "NoiseFloor",
    "RetrievalFigures",
    "figures_of_vectors",
    "gate_reference",
    "measure_retrieval",
]

_REPEATED_LANGUAGES = 8
_REPEATED_BATCH_TOKENS, _REPEATED_BATCH_IMAGES = 192, 7


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Differences of the reference from itself at other batch sizes.

    Attributes:
        languages: Codes of the repeated languages, spread over the set.
        min_cosine: Lowest cosine between the two vectors of a text or image.
        max_abs_drop: Largest change of recall at 1 in any language and direction, as a share.
        top10_overlap: Lowest overlap of the top 10 in any language and direction.
    """

    languages: tuple[str, ...]
    min_cosine: float
    max_abs_drop: float
    top10_overlap: float


@dataclass(frozen=True, slots=True, eq=False)
class GateReference:
    """PyTorch's vectors of a retrieval set; ``sampled`` if only some of its captions are used as queries."""

    dataset: RetrievalSet
    index: TextIndex
    vectors: Vectors
    dim: int
    noise: NoiseFloor
    sampled: bool


@dataclass(frozen=True, slots=True)
class RetrievalFigures:
    """Retrieval results of one engine compared with PyTorch's."""

    dataset: str
    n_images: int
    n_texts: int
    sampled: bool
    images: VectorAgreement
    languages: tuple[LanguageFigures, ...]

    def mean_recall_at_1(self, direction: Direction) -> tuple[float, float]:
        """Return the mean recall at 1 over the languages of PyTorch and of the variant, as shares."""
        chosen = [figures.comparison(direction) for figures in self.languages]
        n = len(chosen)
        return sum(c.reference.at[1] for c in chosen) / n, sum(c.exported.at[1] for c in chosen) / n

    def worst_language(self, direction: Direction) -> LanguageFigures:
        """Return the language with the largest drop of recall at 1."""
        return max(self.languages, key=lambda figures: figures.comparison(direction).drop(1))

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the manifest: recall and cosines per language, without individual hits."""
        means = {direction.value: self.mean_recall_at_1(direction) for direction in Direction}
        return {
            "dataset": self.dataset,
            "n_images": self.n_images,
            "n_texts": self.n_texts,
            "sampled": self.sampled,
            "mean_recall_at_1": {d: {"reference": r, "exported": e} for d, (r, e) in means.items()},
            "images": dataclasses.asdict(self.images),
            "languages": {figures.code: _language_json(figures) for figures in self.languages},
        }


def gate_reference(
    towers: Towers,
    dataset: RetrievalSet,
    *,
    captions_per_language: int | None,
    progress: Progress,
) -> GateReference:
    """Embed a retrieval set with the family's own library, and part of it twice for the noise floor.

    Args:
        captions_per_language: Number of query captions per language, sampled with a fixed seed; None for all.

    Raises:
        LanguageError: the tower supports none of the set's languages.
        ParityError: a vector is not finite.
    """
    spoken, _ = spoken_part(dataset, towers)
    asked = spoken if captions_per_language is None else spoken.sampled(captions_per_language)
    needs_language = towers.text_preprocessing.needs_language
    index = TextIndex.of(asked, with_language=needs_language)
    text = towers.text_preprocessing
    vectors = reference_vectors(towers.reference, asked, index, dim=towers.dim, text=text, progress=progress)
    step = max(1, len(asked.codes) // _REPEATED_LANGUAGES)
    some = asked.select(asked.codes[::step][:_REPEATED_LANGUAGES])
    repeated = reference_vectors(
        towers.reference,
        some,
        TextIndex.of(some, with_language=needs_language),
        dim=towers.dim,
        text=text,
        progress=_renamed(progress, "PyTorch", "PyTorch again:"),
        max_batch_tokens=_REPEATED_BATCH_TOKENS,
        batch_images=_REPEATED_BATCH_IMAGES,
    )
    noise = _noise_floor(some, vectors, repeated)
    return GateReference(asked, index, vectors, towers.dim, noise, captions_per_language is not None)


def measure_retrieval(
    reference: GateReference,
    model: Path,
    *,
    engine: Engine,
    precision: Precision,
    device: Device | None = None,
    threads: int | None,
    progress: Progress,
) -> RetrievalFigures:
    """Measure an exported model's retrieval, from strings and images, and compare it with the reference.

    Args:
        model: ``REPOSITORY/NAME``, with files already verified.
        device: GPU to measure on; None for the engine's own device.
    """
    dataset = reference.dataset
    with LocalEncoder.from_repository(
        model, engine=engine, precision=precision, threads=threads, verify=Checks.NONE, device=device
    ) as encoder:
        found = exported_vectors(encoder, dataset, reference.index, dim=reference.dim, progress=progress)
    return figures_of_vectors(reference, found)


def figures_of_vectors(reference: GateReference, found: Vectors) -> RetrievalFigures:
    """Compare the retrieval of a set's exported vectors with the reference's."""
    dataset = reference.dataset
    return RetrievalFigures(
        dataset=dataset.name,
        n_images=len(dataset.images),
        n_texts=len(reference.index.texts),
        sampled=reference.sampled,
        images=agreement(reference.vectors.images, found.images),
        languages=tuple(
            compare_language(dataset, captions, reference.vectors, found, RetrievalProtocol.ANY)
            for captions in dataset.captions
        ),
    )


def _noise_floor(dataset: RetrievalSet, first: Vectors, second: Vectors) -> NoiseFloor:
    languages = [compare_language(dataset, c, first, second, RetrievalProtocol.ANY) for c in dataset.captions]
    sides: Sequence[Comparison] = [f.comparison(direction) for f in languages for direction in Direction]
    images = agreement(first.images, second.images)
    return NoiseFloor(
        languages=dataset.codes,
        min_cosine=lowest([images.cosine_min, *(figures.texts.cosine_min for figures in languages)]),
        max_abs_drop=max(abs(side.drop(1)) for side in sides),
        top10_overlap=min(side.top10_overlap for side in sides),
    )


def _language_json(figures: LanguageFigures) -> Mapping[str, Any]:
    sides = {direction.value: figures.comparison(direction) for direction in Direction}
    return {
        "n_captions": figures.n_captions,
        "cosine_min": figures.texts.cosine_min,
        "cosine_mean": figures.texts.cosine_mean,
        **{
            name: {
                "reference": {str(k): share for k, share in side.reference.at.items()},
                "exported": {str(k): share for k, share in side.exported.at.items()},
                "top10_overlap": side.top10_overlap,
            }
            for name, side in sides.items()
        },
    }


def _renamed(progress: Progress, old: str, new: str) -> Progress:
    def show(stage: str, done: int, total: int) -> None:
        progress(stage.replace(old, new), done, total)

    return show
