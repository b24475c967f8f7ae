"""Inputs for timing graphs: the samples' captions and drawings, in the requested shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.retrieval.sample_set import sample_retrieval_set
from runtime.manifest import Manifest, Modality
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.preprocessing.text import Text, Tokenizer

__all__ = ["Shape", "inputs_of_shape", "shapes_of"]

_N_CAPTIONS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a run, and tokens per row; ``tokens`` is ``None`` for images."""

    batch: int
    tokens: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of a graph's dynamic dimensions."""
        return {"batch": self.batch, "sequence": self.tokens or 1}


def shapes_of(
    manifest: Manifest, modality: Modality, *, batches: Sequence[int], tokens: Sequence[int]
) -> tuple[Shape, ...]:
    """Return every batch with every length, cut to the tower's longest."""
    if modality is Modality.IMAGE:
        return tuple(Shape(batch) for batch in batches)
    lengths = dict.fromkeys(min(n, manifest.text.context_length) for n in tokens)
    return tuple(Shape(batch, length) for batch in batches for length in lengths)


def inputs_of_shape(
    manifest: Manifest, tokenizer: Path, modality: Modality, shape: Shape
) -> Mapping[str, NDArray[Any]]:
    """Return a batch of the samples; captions are joined to the full length, without padding."""
    if modality is Modality.IMAGE:
        images = islice(cycle(sample_retrieval_set().images), shape.batch)
        pixels = [pixels_from_image(decode(image.read()), manifest.image) for image in images]
        return {"pixels": np.stack(pixels)}
    assert shape.tokens is not None
    ids = np.stack(
        [
            _cut(row, shape.tokens, manifest.text.suffix_ids)
            for row in _rows(manifest, tokenizer, shape.batch, shape.tokens)
        ]
    )
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _rows(manifest: Manifest, tokenizer: Path, n_rows: int, n_tokens: int) -> list[Sequence[int]]:
    """Return rows of at least so many tokens, each in one language."""
    known = manifest.languages
    entries = [entry for entry in sample_retrieval_set().captions if entry.language in known]
    texts = []
    for i in range(n_rows):
        entry = entries[i % len(entries)]
        running = islice(cycle(entry.texts[i // len(entries) :]), max(_N_CAPTIONS, n_tokens))
        language = entry.language if manifest.text.needs_language else None
        texts.append(Text(" ".join(running), i, language))
    found = Tokenizer(tokenizer, manifest.text).rows_from_texts(texts)
    return [row.ids for row in found]


def _cut(ids: Sequence[int], n_tokens: int, suffix: Sequence[int]) -> NDArray[np.int64]:
    if len(ids) < n_tokens:
        raise ValueError(f"A text of {len(ids)} tokens cannot be cut to {n_tokens}.")
    if n_tokens <= len(suffix):
        return np.asarray(ids[:n_tokens], dtype=np.int64)
    return np.asarray([*ids[: n_tokens - len(suffix)], *suffix], dtype=np.int64)
