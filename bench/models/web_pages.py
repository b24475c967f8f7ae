"""Web pages to measure: of sample checkpoints, and of published variants with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.models.full_size import in_process
from bench.models.immich_models import options_for_timing, tokenizer_of_true_size
from bench.models.samples import sample_checkpoint
from bench.models.speed_artefacts import torch_towers
from runtime.cosines import unit_rows
from runtime.manifest import Precision

if TYPE_CHECKING:
    from export.layouts.web.gallery import WebGallery
    from export.towers import Towers

__all__ = ["page_folder"]

_ROWS = 1_911
_IMAGE_TOWER = "nllb-clip"


def page_folder(model: str, languages: Sequence[str], work: Path, *, published: bool) -> Path:
    """Return the page of a model with the vocabulary of some languages; it is made where it is missing.

    Args:
        model: Name of a sample, or of a published variant.
        languages: Languages to keep; all if empty.
        published: Take the published variant's text tower with random weights, a tokenizer of its size, and
            a gallery of random vectors.
    """
    folder = work / "web" / ("-".join(languages) or "all")
    if not (folder / model / "site.json").is_file():
        if published:
            in_process(_write_published, model, tuple(languages), work, folder)
        else:
            in_process(_write_sample, model, tuple(languages), folder)
    return folder / model


def _write_sample(model: str, languages: tuple[str, ...], folder: Path) -> None:
    from export.checkpoint import towers_from_checkpoint

    _write(towers_from_checkpoint(sample_checkpoint(model)), model, languages, folder, None)


def _write_published(model: str, languages: tuple[str, ...], work: Path, folder: Path) -> None:
    """Write a page of the variant's text tower; no page has an image tower, so that a small one will do."""
    from export.checkpoint import towers_from_checkpoint
    from export.layouts.web.gallery import WebGallery

    text = torch_towers(model, work)
    image = towers_from_checkpoint(sample_checkpoint(_IMAGE_TOWER))
    towers = dataclasses.replace(
        text,
        tokenizer_json=tokenizer_of_true_size(text.tokenizer_json, text.n_tokens),
        image=image.image,
        image_preprocessing=image.image_preprocessing,
    )
    vectors = unit_rows(np.random.default_rng(0).standard_normal((_ROWS, text.dim), np.float32))
    names = [f"random vector {i}" for i in range(_ROWS)]
    gallery = WebGallery("Random vectors", "random vectors", names, vectors, iter(()))
    _write(towers, model, languages, folder, gallery)


def _write(
    towers: Towers, model: str, languages: tuple[str, ...], folder: Path, gallery: WebGallery | None
) -> None:
    from export.layouts.publish import layout_for_timing
    from export.layouts.web.layout import WebOptions, web_layout
    from export.vocabulary.selection import VocabularyOptions

    options = dataclasses.replace(
        options_for_timing(Precision.INT8), vocabulary=VocabularyOptions(languages) if languages else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    layout_for_timing(towers, folder, web_layout(WebOptions(gallery)), name=model, options=options)
