"""Full-size models of random weights in immich's folder, and the tower's plain graph to time beside them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.models.full_size import in_process
from bench.models.samples import CHECKPOINTS
from bench.models.speed_artefacts import fp32_graph, torch_towers
from runtime.manifest import TOKENIZER_FILE, Engine, Modality, Precision, manifest_path

if TYPE_CHECKING:
    from export.repository import ExportOptions

__all__ = [
    "full_size_folder",
    "options_for_timing",
    "plain_text_graph",
    "recall_of_sample",
    "served_repository",
    "tokenizer_of_true_size",
]

_IMAGE_TOWER = "nllb-clip"

_FEW_TEXTS = 32
"""Texts and images that calibrate random weights: enough for speed and form, not for accuracy."""


def full_size_folder(variant: str, precision: Precision, work: Path) -> Path:
    """Return the folder of a published variant in one precision; it is made where it is missing."""
    cache = work / "immich" / precision.value
    found = list((cache / "clip").glob("*/babeltower.json"))
    if not found:
        in_process(_lay_out, variant, precision, work, cache)
        found = list((cache / "clip").glob("*/babeltower.json"))
    return found[0].parent


def served_repository(
    variant: str, precision: Precision, work: Path, *, languages: tuple[str, ...] = ()
) -> Path:
    """Return a repository that holds a published text tower in one precision; it is made where it is missing.

    Its image tower is a sample's, so that less than 5 GB of memory make it.

    Args:
        languages: Languages to keep of the vocabulary; all if empty.
    """
    repository = work / "served" / precision.value / ("-".join(languages) or "all")
    if not manifest_path(repository / variant).is_file():
        in_process(_publish, variant, precision, work, repository, languages)
    return repository


def _publish(
    variant: str, precision: Precision, work: Path, repository: Path, languages: tuple[str, ...]
) -> None:
    import dataclasses

    from export.checkpoint import towers_from_checkpoint
    from export.repository import drafted
    from export.vocabulary.pruned_towers import pruned_towers
    from export.vocabulary.selection import VocabularyOptions
    from runtime.repository import publish

    towers = torch_towers(variant, work)
    small = towers_from_checkpoint(CHECKPOINTS / _IMAGE_TOWER)
    towers = dataclasses.replace(
        towers,
        tokenizer_json=tokenizer_of_true_size(towers.tokenizer_json, towers.n_tokens),
        image=small.image,
        image_preprocessing=small.image_preprocessing,
    )
    options = options_for_timing(precision)
    if languages:
        options = dataclasses.replace(options, vocabulary=VocabularyOptions(languages))
        towers = pruned_towers(towers, VocabularyOptions(languages))
    with drafted(towers, repository, name=variant, options=options, measured=False) as draft:
        unmeasured = {"measured": "nothing: the weights are random"}
        publish(
            draft.stage, repository, draft.manifest, dataclasses.replace(draft.variant, parity=unmeasured)
        )


def plain_text_graph(variant: str, work: Path) -> Path:
    """Return the text tower's FP32 graph, which computes every position that it is given."""
    in_process(fp32_graph, variant, Modality.TEXT, work)
    return fp32_graph(variant, Modality.TEXT, work)


def _lay_out(variant: str, precision: Precision, work: Path, cache: Path) -> None:
    from export.layouts.names import LayoutName
    from export.layouts.publish import layout_for_timing

    towers = torch_towers(variant, work)
    cache.mkdir(parents=True, exist_ok=True)
    done = layout_for_timing(towers, cache, LayoutName.IMMICH, options=options_for_timing(precision))
    tokenizer = done.folder / "textual" / TOKENIZER_FILE
    tokenizer.write_text(tokenizer_of_true_size(tokenizer.read_text(encoding="utf-8"), towers.n_tokens))


def options_for_timing(precision: Precision) -> ExportOptions:
    """Return options of a model of random weights, calibrated on a few samples and rounded to the nearest."""
    from export.precision.calibration import CalibrationSize
    from export.precision.int8 import Int8Recipe
    from export.precision.weight_rounding import Rounding
    from export.repository import ExportOptions
    from export.variants import forms_for

    return ExportOptions(
        forms=forms_for([precision], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME]),
        calibration_size=CalibrationSize(n_texts=_FEW_TEXTS, n_images=_FEW_TEXTS // 4),
        recipes={modality: Int8Recipe(rounding=Rounding.NEAREST) for modality in Modality},
    )


def tokenizer_of_true_size(tokenizer_json: str, n_tokens: int) -> str:
    """Give a sample's BPE tokenizer as many merges as a published one has, since its file takes time to read.

    The new tokens are joins of two of its own; the ids of the old ones stay.
    """
    data: dict[str, Any] = json.loads(tokenizer_json)
    vocabulary: dict[str, int] = data["model"]["vocab"]
    own = [token for token in vocabulary if token.isalpha() and len(token) <= 4]
    # listed in the vocabulary, added tokens keep their ids behind a larger one
    vocabulary.update({token["content"]: token["id"] for token in data["added_tokens"]})
    next_id = itertools.count(1 + max(vocabulary.values()))
    for first, second in itertools.product(own, own):
        if len(vocabulary) >= n_tokens:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = next(next_id)
            data["model"]["merges"].append([first, second])
    return json.dumps(data, ensure_ascii=False)


def recall_of_sample(sample: str, precision: Precision, folder: Path, captions: int) -> list[float]:
    """Lay out a sample through its gate; return the points of R@1 lost, by direction, mean over languages."""
    from export.layouts.names import LayoutName
    from export.layouts.publish import layout_from_checkpoint
    from export.repository import ExportOptions
    from export.retrieval.comparison import Direction
    from export.variants import forms_for

    options = ExportOptions(
        forms=forms_for([precision], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME]),
        captions_per_language=captions,
        texts_per_language=1,
    )
    name = "nllb-clip-base-siglip__mrl"
    done = layout_from_checkpoint(CHECKPOINTS / sample, folder, LayoutName.IMMICH, name=name, options=options)
    assert done.parity is not None
    (figures,) = done.parity.report.retrieval.values()
    return [
        100 * (reference - exported)
        for reference, exported in (figures.mean_recall_at_1(direction) for direction in Direction)
    ]
