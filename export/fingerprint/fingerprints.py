"""Fingerprint of the embedding space, which changes if and only if the embeddings change.

Weights, vocabulary and preprocessing are hashed exactly. Behaviour is hashed through its results: the token
ids of a fixed set of texts from the family's own tokenizer; both towers' vectors of fixed inputs, computed in
float64 and rounded to ``STEP``; and the deviations of the family's own library on these inputs.
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
"""Rounding step of vectors. Float64 errors are about 1e-15 per component, so about two components in a
billion round differently on another machine; a change of 1e-8 moves dozens."""

_SAME_VECTOR, _SAME_PIXEL = 1e-4, 0.1
"""Rounding steps of the library's deviations: ten times the error of FP32 and of one pixel level of 255, so
that a library in agreement rounds to 0 on every machine."""

_MAX_SINUSOID_ERROR = 1e-3
"""Maximum error of sinusoidal positions computed in float32, up to about position 10,000."""


def with_fingerprint(towers: Towers, *, unmerged: Iterable[nn.Module] | None = None) -> Towers:
    """Add the fingerprint: ``bt2-`` and 32 hex digits of a sha256 over weights, settings, token ids, vectors.

    Weights are hashed as FP32 values without their names, so the fingerprint does not depend on the file
    format (safetensors or ``.bin``), the stored precision (FP16 or FP32) or the naming. Precision variants
    share it.

    Args:
        unmerged: Modules with unmerged adapter layers, hashed in place of the merged weights, whose last bit
            may differ between processors.
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
    """Fixed inputs of both towers: batches of token ids with masks, and normalised float64 pixels."""

    tokens: Sequence[tuple[Int, Int]]
    pixels: NDArray[np.float64]

    @classmethod
    def of(cls, text: TextTowerModule, tokens: TextPreprocessing, pixels: ImagePreprocessing) -> FixedInputs:
        """Create the inputs for a checkpoint's vocabulary, context length and image size."""
        n_tokens = int(text.encoder.get_submodule("tokens").get_parameter("weight").shape[0])
        return cls(
            tuple(fixed_token_rows(tokens, n_tokens)),
            _normalised(fixed_pixels(pixels.height, pixels.width), pixels),
        )


def behaviour_vectors(
    text: TextTowerModule, image: ImageTowerModule, inputs: FixedInputs
) -> Iterator[NDArray[np.float64]]:
    """Compute unit vectors of the fixed inputs in float64: one (rows, width) per batch and output width."""
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
    """Yield the rounded differences between the family's library and the towers and preprocessing."""
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
    """Scale to 0..1 and normalise with mean and std rounded to FP32, as libraries use them."""
    mean, std = (
        np.asarray(values, np.float32).astype(np.float64).reshape(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    normalised: NDArray[np.float64] = (pixels / 255.0 - mean) / std
    return normalised


def exact_positions(text: TextTowerModule) -> Tensor | None:
    """Compute sinusoidal positions in float64; None if the tower's positions are learned.

    Libraries compute them in float32, where the last digits depend on the processor.

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
    """Return the hex sha256 of shape and float32 values; empty for integers, which embeddings do not use."""
    if not tensor.is_floating_point():
        return ""
    values = tensor.detach().to(torch.float32).contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)}\n".encode())
    digest.update(values.view(-1).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer_json: str) -> dict[str, Any]:
    """Extract pieces, scores, merges and added tokens; the other fields vary with the writing library."""
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
    """Return the settings with mean and std rounded to FP32, as libraries use them."""
    rounded = {
        name: [float(np.float32(value)) for value in getattr(preprocessing, name)] for name in ("mean", "std")
    }
    return {**_settings(preprocessing), **rounded}


def _settings(preprocessing: TextPreprocessing | ImagePreprocessing) -> dict[str, Any]:
    """Return only non-default settings, so that a new setting does not change existing fingerprints."""
    usual = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(preprocessing)
    }
    return {name: value for name, value in asdict(preprocessing).items() if value != usual[name]}


def _update(digest: Any, values: NDArray[np.float64] | Int) -> None:
    digest.update(f"{values.shape}\n".encode())
    digest.update(np.ascontiguousarray(np.nan_to_num(values)).astype("<i8").tobytes())
