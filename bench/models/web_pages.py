"""Web pages to measure: of sample checkpoints, and of published variants with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.models.full_size import in_process
from bench.models.immich_models import FEW_TEXTS, tokenizer_of_true_size
from bench.models.samples import sample_checkpoint
from bench.models.speed_artefacts import torch_towers
from runtime.manifest import Engine, Precision

__all__ = ["page_folder"]


def page_folder(model: str, languages: tuple[str, ...], work: Path, *, published: bool) -> Path:
    """Return the page of a model with the vocabulary of some languages; it is made where it is missing.

    Args:
        model: Name of a sample, or of a published variant.
        languages: Languages to keep; all if empty.
        published: Take the published variant with random weights, and a tokenizer of its size.
    """
    folder = work / "web" / ("-".join(languages) or "all")
    if not (folder / model / "site.json").is_file():
        in_process(_write_page, model, languages, work, folder, published)
    return folder / model


def _write_page(model: str, languages: tuple[str, ...], work: Path, folder: Path, published: bool) -> None:
    from export.checkpoint import towers_from_checkpoint
    from export.layouts.names import LayoutName
    from export.layouts.publish import layout_for_timing
    from export.precision.calibration import CalibrationSize
    from export.repository import ExportOptions
    from export.variants import forms_for
    from export.vocabulary.selection import VocabularyOptions

    if published:
        towers = torch_towers(model, work)
        tokenizer = tokenizer_of_true_size(towers.tokenizer_json, towers.n_tokens)
        towers = dataclasses.replace(towers, tokenizer_json=tokenizer)
    else:
        towers = towers_from_checkpoint(sample_checkpoint(model))
    options = ExportOptions(
        forms=forms_for([Precision.INT8], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME]),
        calibration_size=CalibrationSize(n_texts=FEW_TEXTS, n_images=FEW_TEXTS // 4),
        vocabulary=VocabularyOptions(languages) if languages else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    layout_for_timing(towers, folder, LayoutName.WEB, name=model, options=options)
