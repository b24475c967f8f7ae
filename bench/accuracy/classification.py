"""Compare zero-shot classification by PyTorch and by an exported model, and make the report.

Each model embeds the images once, then the class prompts language by language, and only the class vectors are
kept: 80 prompts of 1,000 classes in 90 languages would not fit into memory. ``runtime.zeroshot`` computes the
class vectors, as for a ``Classifier``.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.accuracy.classification_report import ClassFigures, ClassificationReport
from bench.accuracy.evaluation import (
    EvaluationSettings,
    chosen_dim,
    facts_of,
    require_same_space,
    sample_model,
    timed,
)
from bench.accuracy.retrieval_report import ModelFacts
from bench.datasets.class_sets import ClassificationSet, ClassNames
from bench.records.environment import environment
from export.checkpoint import towers_from_checkpoint
from export.parity.limits import limits_of
from export.retrieval.comparison import compare_retrieval
from export.retrieval.metrics import Float, RetrievalProtocol, agreement
from export.retrieval.vectors import (
    REFERENCE_PADDING,
    Progress,
    TextIndex,
    exported_image_vectors,
    exported_text_vectors,
    reference_image_vectors,
    reference_text_vectors,
    silent,
)
from export.towers import Towers
from runtime.errors import LanguageError
from runtime.local import LocalEncoder
from runtime.preprocessing.languages import english_name
from runtime.zeroshot import class_vectors_from_prompts, prompts_from_labels

__all__ = ["classify", "classify_sample", "classify_towers"]

_Embed = Callable[[TextIndex], Float]


def classify(
    checkpoint: str | Path,
    model: str | Path,
    dataset: ClassificationSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> ClassificationReport:
    """Classify with a checkpoint and with the model exported from it, and compare.

    Args:
        dataset: Set with its templates chosen (``asked_by``).

    Raises:
        ManifestError: the model was exported from other weights, or not in that precision.
        BabeltowerError: the checkpoint, the model or an image cannot be read.
    """
    return classify_towers(towers_from_checkpoint(checkpoint), checkpoint, model, dataset, settings, progress)


def classify_sample(
    checkpoint: str | Path,
    repository: Path,
    dataset: ClassificationSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> ClassificationReport:
    """Export the checkpoint unless the repository has it with these weights, then ``classify``."""
    towers = towers_from_checkpoint(checkpoint)
    model = sample_model(towers, Path(checkpoint).name, repository, settings, progress)
    return classify_towers(towers, checkpoint, model, dataset, settings, progress)


def classify_towers(
    towers: Towers,
    checkpoint: str | Path,
    model: str | Path,
    dataset: ClassificationSet,
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> ClassificationReport:
    """Classify as ``classify`` does, with towers that are already loaded."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dim = chosen_dim(towers, settings)
    dataset, unspoken = _spoken_part(dataset, towers)
    seconds: dict[str, float] = {}
    with timed(seconds, "exported"):
        facts, exported = _by_exported(towers, checkpoint, model, dataset, settings, progress)
    with timed(seconds, "pytorch"):
        reference = _by_reference(towers, dataset, dim, progress)
    with timed(seconds, "classification"):
        figures = tuple(_figures(dataset, names, reference, exported) for names in dataset.languages)
    return ClassificationReport(
        model=facts,
        dataset=dataset.name,
        prompts=dataset.prompts,
        notes=dataset.notes,
        language_map=settings.language_map,
        reference_padding=REFERENCE_PADDING,
        n_images=len(dataset.images),
        unspoken=unspoken,
        languages=figures,
        images=agreement(reference.images, exported.images),
        limits=limits_of(settings.precision, settings.engine).retrieval,
        seconds=seconds,
        environment=environment(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Embedded:
    """float32 unit vectors: images (images, dim), and classes (classes, dim) by language."""

    images: Float
    classes: Mapping[str, Float]


def _by_exported(
    towers: Towers,
    checkpoint: str | Path,
    model: str | Path,
    dataset: ClassificationSet,
    settings: EvaluationSettings,
    progress: Progress,
) -> tuple[ModelFacts, _Embedded]:
    dim = chosen_dim(towers, settings)
    with LocalEncoder.from_repository(
        model,
        engine=settings.engine,
        precision=settings.precision,
        threads=settings.threads,
        device=settings.device,
    ) as encoder:
        require_same_space(encoder.manifest, towers, model)

        def texts(index: TextIndex) -> Float:
            return exported_text_vectors(encoder, index, dim=dim, progress=silent)

        images = exported_image_vectors(encoder, dataset.images, dim=dim, progress=progress)
        classes = _class_vectors(towers, dataset, texts, "exported classes", progress)
        return facts_of(encoder.manifest, checkpoint, settings), _Embedded(images, classes)


def _by_reference(towers: Towers, dataset: ClassificationSet, dim: int, progress: Progress) -> _Embedded:
    reference, text = towers.reference, towers.text_preprocessing

    def texts(index: TextIndex) -> Float:
        return reference_text_vectors(reference, index, dim=dim, text=text, progress=silent)

    images = reference_image_vectors(reference, dataset.images, dim=dim, progress=progress)
    return _Embedded(images, _class_vectors(towers, dataset, texts, "PyTorch classes", progress))


def _class_vectors(
    towers: Towers, dataset: ClassificationSet, embed: _Embed, stage: str, progress: Progress
) -> Mapping[str, Float]:
    """Return class vectors by language code, float32 (classes, dim)."""
    found = {}
    for done, names in enumerate(dataset.languages):
        progress(stage, done, len(dataset.languages))
        language = names.language if towers.text_preprocessing.needs_language else None
        prompts = prompts_from_labels(names.labels, names.templates)
        index = TextIndex.of_texts(names.code, prompts, language)
        vectors = embed(index)[index.rows[names.code]]
        found[names.code] = class_vectors_from_prompts(vectors, n_labels=len(names.labels))
    progress(stage, len(dataset.languages), len(dataset.languages))
    return found


def _figures(
    dataset: ClassificationSet, names: ClassNames, reference: _Embedded, exported: _Embedded
) -> ClassFigures:
    rows = dataset.rows(names)
    images = reference.images[rows], exported.images[rows]
    classes = reference.classes[names.code], exported.classes[names.code]
    return ClassFigures(
        code=names.code,
        language=names.language,
        name=english_name(names.language) if names.language else names.code,
        n_classes=len(names.classes),
        n_images=len(rows),
        n_templates=len(names.templates),
        classification=compare_retrieval(images, classes, dataset.relevance(names), RetrievalProtocol.ANY),
        texts=agreement(*classes),
    )


def _spoken_part(dataset: ClassificationSet, towers: Towers) -> tuple[ClassificationSet, tuple[str, ...]]:
    if not towers.text_preprocessing.needs_language:
        return dataset, ()
    known = towers.text_preprocessing.language_ids
    spoken = [names.code for names in dataset.languages if names.language in known]
    if not spoken:
        raise LanguageError(
            f"The text tower has language tokens for none of {list(dataset.codes)}; it has {sorted(known)}. "
            "Choose another language map or data set."
        )
    return dataset.select(spoken), tuple(code for code in dataset.codes if code not in spoken)
