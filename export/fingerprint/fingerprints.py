"""The embedding-space fingerprint: it changes whenever vectors do, and with nothing else.

Weights, vocabulary and preprocessing are hashed exactly. Behaviour is hashed as it shows: token ids that the
family's own tokenizer gives a fixed set of texts, vectors that both towers give fixed inputs, computed in
float64 and rounded to ``STEP``, and whatever the family's own library makes otherwise of these inputs.
See docs/decisions/0005-fingerprint.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.fingerprint.double_precision import in_double
from export.fingerprint.fixed_inputs import fixed_images, fixed_pixels, fixed_texts, fixed_token_rows
from export.towers import ImageTowerModule, Int, Reference, TextTowerModule, Towers, unit
from runtime.fingerprints import KIND
from runtime.manifest import ImagePreprocessing, TextPreprocessing
from runtime.preprocessing.image import pixels_from_image

__all__ = [
    "STEP",
    "FixedInputs",
    "behaviour_vectors",
    "with_fingerprint",
]

STEP = 1e-6
"""Vectors are rounded to multiples of this. Float64 leaves errors of about 1e-15 in a component, so that two
in a billion lie near enough to an edge to be rounded otherwise elsewhere; a change of 1e-8 moves dozens."""

_SAME_VECTOR, _SAME_PIXEL = 1e-4, 0.1
"""Steps of what the library makes otherwise: ten times what FP32 and one level of 255 explain, so that
agreement is 0 on every machine."""

_MAX_SINUSOID_ERROR = 1e-3
"""Largest error of a sinusoidal position computed in float32, at position 10,000 or so."""


def with_fingerprint(towers: Towers, *, unmerged: Iterable[nn.Module] | None = None) -> Towers:
    """Add the fingerprint: ``bt2-`` and 32 hex digits of a sha256 over weights, settings, token ids, vectors.

    Weights count as FP32 values, under no names: a checkpoint has one fingerprint whether it is stored as
    safetensors or ``.bin``, in FP16 or FP32, under old or new names. Precision variants share it.

    Args:
        unmerged: Modules with an adapter's layers beside the base's, hashed in place of merged weights: a
            merge's sums may differ in their last bit from one processor to another.
    """
    text, image = towers.text, towers.image
    positions = exact_positions(text)
    digest = hashlib.sha256(b"babeltower embedding space 2\n")
    weights: Iterable[Tensor] = (*_text_weights(text, positions), *_image_weights(image))
    if unmerged is not None:
        weights = (tensor for module in unmerged for tensor in module.state_dict().values())
    digest.update(json.dumps(sorted(map(_digest_of_tensor, weights))).encode())
    settings = {
        "vocabulary": _vocabulary(towers.tokenizer_json),
        "text": _settings(towers.text_preprocessing),
        "image": _image_settings(towers.image_preprocessing),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    texts, languages = fixed_texts(towers.text_preprocessing)
    _update(digest, towers.reference.token_ids(texts, languages))
    inputs = FixedInputs.of(text, towers.text_preprocessing, towers.image_preprocessing)
    vectors = list(behaviour_vectors(text, image, inputs))
    for found in vectors:
        _update(digest, np.rint(found / STEP))
    for deviation in _deviations(towers.reference, vectors, inputs, towers.image_preprocessing):
        _update(digest, deviation)
    return dataclasses.replace(towers, fingerprint=f"{KIND}-{digest.hexdigest()[:32]}")


@dataclass(frozen=True, slots=True)
class FixedInputs:
    """Inputs of both towers: batches of token rows with their masks, and normalised float64 pixels."""

    tokens: Sequence[tuple[Int, Int]]
    pixels: NDArray[np.float64]

    @classmethod
    def of(cls, text: TextTowerModule, tokens: TextPreprocessing, pixels: ImagePreprocessing) -> FixedInputs:
        """Shape the inputs to a checkpoint's vocabulary, context length and image size."""
        n_tokens = int(text.encoder.get_submodule("tokens").get_parameter("weight").shape[0])
        return cls(
            tuple(fixed_token_rows(tokens, n_tokens)),
            _normalised(fixed_pixels(pixels.height, pixels.width), pixels),
        )


def behaviour_vectors(
    text: TextTowerModule, image: ImageTowerModule, inputs: FixedInputs
) -> Iterator[NDArray[np.float64]]:
    """Compute unit vectors of the fixed inputs in float64: (rows, width) for each batch, then width."""
    buffers = {} if (positions := exact_positions(text)) is None else {"encoder.positions": positions}
    for batch in inputs.tokens:
        with in_double():
            outputs = torch.func.functional_call(text, buffers, tuple(map(torch.from_numpy, batch)))
        yield from (output.numpy() for output in outputs)
    with in_double():
        features = image.encoder(torch.from_numpy(inputs.pixels))
        outputs = (unit(features), *image.heads(features))
    yield from (output.numpy() for output in outputs)


def _deviations(
    reference: Reference,
    vectors: Sequence[NDArray[np.float64]],
    inputs: FixedInputs,
    preprocessing: ImagePreprocessing,
) -> Iterator[NDArray[np.float64]]:
    """Tell in whole steps where the family's own library does not do what the towers and the settings say."""
    batches = [reference.text_vectors(ids) for ids, _ in inputs.tokens]
    batches.append(reference.image_vectors(inputs.pixels.astype(np.float32)))
    n_heads = len(vectors) // len(batches)
    for i, batch in enumerate(batches):
        own = {found.shape[1]: found for found in vectors[i * n_heads : (i + 1) * n_heads]}
        for width, found in own.items():
            yield np.rint((batch[width] - found) / _SAME_VECTOR)
    for picture in fixed_images(preprocessing.height, preprocessing.width):
        expected = _normalised(pixels_from_image(picture, preprocessing), preprocessing)
        yield np.rint((reference.pixels(picture) - expected) / _SAME_PIXEL)


def _normalised(pixels: NDArray[np.uint8], preprocessing: ImagePreprocessing) -> NDArray[np.float64]:
    """Scale to 0..1 and normalise by the FP32 values that libraries subtract and divide by."""
    mean, std = (
        np.asarray(values, np.float32).astype(np.float64).reshape(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    normalised: NDArray[np.float64] = (pixels / 255.0 - mean) / std
    return normalised


def exact_positions(text: TextTowerModule) -> Tensor | None:
    """Sinusoidal positions in float64; ``None`` where the tower's are learned.

    A library computes them in float32, where their last digits depend on the processor.

    Source:
        ``M2M100SinusoidalPositionalEmbedding`` of transformers' ``modeling_m2m_100.py``.
    """
    stored = text.encoder.get_buffer("positions")
    n_positions, width = stored.shape
    half = width // 2
    if half < 2:
        return None
    rates = np.exp(np.arange(half) * -(np.log(10_000.0) / (half - 1)))
    angles = np.arange(n_positions)[:, None] * rates
    table = np.zeros((n_positions, width))
    table[:, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    pad_id = int(getattr(text.encoder, "pad_id", -1))
    if 0 <= pad_id < n_positions:
        table[pad_id] = 0.0
    exact = torch.from_numpy(table)
    return exact if float((stored.double() - exact).abs().max()) < _MAX_SINUSOID_ERROR else None


def _text_weights(text: TextTowerModule, positions: Tensor | None) -> Iterator[Tensor]:
    yield from text.state_dict().values()
    if positions is None:
        yield text.encoder.get_buffer("positions")


def _image_weights(image: ImageTowerModule) -> Iterator[Tensor]:
    yield from image.state_dict().values()
    if "positions" in dict(image.encoder.named_buffers()):
        yield image.encoder.get_buffer("positions")


def _digest_of_tensor(tensor: Tensor) -> str:
    """Hex sha256 of a shape and float32 values; empty for whole numbers, which no family's vectors need."""
    if not tensor.is_floating_point():
        return ""
    values = tensor.detach().to(torch.float32).contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)}\n".encode())
    digest.update(values.view(-1).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer_json: str) -> dict[str, Any]:
    """Pieces, scores, merges and added tokens; how a file spells the rest depends on who wrote it."""
    data = json.loads(tokenizer_json)
    model = data["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges") or ()]
    flags = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "type": model.get("type"),
        "vocab": model["vocab"],
        "merges": merges,
        "added": [[token.get(flag) for flag in flags] for token in data.get("added_tokens") or ()],
    }


def _image_settings(preprocessing: ImagePreprocessing) -> dict[str, Any]:
    """Settings with mean and standard deviation as the FP32 values that libraries subtract and divide by."""
    rounded = {
        name: [float(np.float32(value)) for value in getattr(preprocessing, name)] for name in ("mean", "std")
    }
    return {**_settings(preprocessing), **rounded}


def _settings(preprocessing: TextPreprocessing | ImagePreprocessing) -> dict[str, Any]:
    """Settings that are not at their default: one that is added later changes no fingerprint by itself."""
    usual = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(preprocessing)
    }
    return {name: value for name, value in asdict(preprocessing).items() if value != usual[name]}


def _update(digest: Any, values: NDArray[np.float64] | Int) -> None:
    digest.update(f"{values.shape}\n".encode())
    digest.update(np.ascontiguousarray(np.nan_to_num(values)).astype("<i8").tobytes())
