"""Expected results for the probes, computed with the family's own library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.parity.probes import ProbeText, one_token_words, probe_files, probe_texts
from export.towers import Float, Int, Towers
from runtime.manifest import ImagePreprocessing, Modality
from runtime.preprocessing.batching import lengths_of_rows
from runtime.preprocessing.image_formats import open_image

__all__ = [
    "Expectations",
    "ExpectedRun",
    "channel_statistics",
    "expected_of_reference",
    "opened_probe",
    "text_vectors",
]

SHAPES = ((1, 2), (2, 77), (7, 16), (32, 2), (32, 16))
"""Grid of batch × sequence sizes; a sequence is capped at the context length."""

_REFERENCE_BATCH = 16


@dataclass(frozen=True, slots=True)
class ExpectedRun:
    """Random inputs of one graph run, and the reference's outputs by width."""

    modality: Modality
    name: str
    inputs: Mapping[str, NDArray[Any]]
    expected: Mapping[int, Float]


@dataclass(frozen=True, slots=True)
class Expectations:
    """Probes and the library's results for them; ``texts`` and ``image_vectors`` are vectors by width."""

    probes: Sequence[ProbeText]
    ids: Int
    texts: Mapping[int, Float]
    images: Sequence[Image.Image | bytes]
    pixels: Float
    image_vectors: Mapping[int, Float]
    cells: Sequence[ExpectedRun]


def expected_of_reference(towers: Towers, texts_per_language: int) -> Expectations:
    """Run the library on the probes and on the grid of batch and sequence sizes."""
    probes = probe_texts(
        towers.text_preprocessing,
        per_language=texts_per_language,
        words=one_token_words(towers.tokenizer_json),
    )
    ids = towers.reference.token_ids([p.text for p in probes], [p.language for p in probes])
    images = probe_files(towers.image_preprocessing)
    pixels = np.stack([towers.reference.pixels(opened_probe(image)) for image in images])
    return Expectations(
        probes=probes,
        ids=ids,
        texts=text_vectors(towers, ids),
        images=images,
        pixels=pixels,
        image_vectors=towers.reference.image_vectors(pixels),
        cells=[*_text_cells(towers), *_image_cells(towers)],
    )


def opened_probe(image: Image.Image | bytes) -> Image.Image:
    """Open a file as a user of the library would; pass Pillow images through."""
    return open_image(image, name="of a probe") if isinstance(image, bytes) else image


def text_vectors(towers: Towers, ids: Int) -> dict[int, Float]:
    """Compute reference vectors in batches of similar length, since padding is costly and changes nothing."""
    lengths = lengths_of_rows(ids, towers.text_preprocessing)
    order = np.argsort(lengths, kind="stable")
    vectors = {dim: np.empty((len(ids), dim), np.float32) for dim in towers.dims}
    for start in range(0, len(ids), _REFERENCE_BATCH):
        rows = order[start : start + _REFERENCE_BATCH]
        for dim, batch in towers.reference.text_vectors(ids[rows, : lengths[rows].max()]).items():
            vectors[dim][rows] = batch
    return vectors


def _text_cells(towers: Towers) -> Iterator[ExpectedRun]:
    random = np.random.default_rng(1)
    text = towers.text_preprocessing
    n_tokens = towers.n_tokens
    shapes = ((batch, text.context_length if text.fixed_length else sequence) for batch, sequence in SHAPES)
    for batch, sequence in dict.fromkeys(shapes):
        sequence = min(sequence, text.context_length)
        ids = random.integers(text.pad_id + 1, n_tokens, (batch, sequence))
        for row in range(1, batch, 2):
            ids[row, max(2, sequence * row // batch) :] = text.pad_id
        arrays = {"input_ids": ids, "attention_mask": (ids != text.pad_id).astype(np.int64)}
        inputs = {name: arrays[name] for name in text.graph_inputs}
        yield ExpectedRun(
            Modality.TEXT, f"text {batch}×{sequence}", inputs, towers.reference.text_vectors(ids)
        )


def _image_cells(towers: Towers) -> Iterator[ExpectedRun]:
    random = np.random.default_rng(2)
    image = towers.image_preprocessing
    mean, std = channel_statistics(image)
    for batch in (1, 2, 7):
        pixels = random.integers(0, 256, (batch, 3, image.height, image.width), dtype=np.uint8)
        normalised = (pixels.astype(np.float32) / 255 - mean) / std
        expected = towers.reference.image_vectors(normalised.astype(np.float32))
        yield ExpectedRun(Modality.IMAGE, f"image {batch}", {"pixels": pixels}, expected)


def channel_statistics(image: ImagePreprocessing) -> tuple[Float, Float]:
    """Return the mean and standard deviation of the normalisation, float32 (3, 1, 1) each."""
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (image.mean, image.std))
    return mean, std
