"""Variants of an earlier export to keep: those proven to share the new export's embedding space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.parity.expectations import Expectations
from export.parity.limits import limits_of
from export.towers import Towers
from runtime.errors import BabeltowerError, ManifestError
from runtime.fingerprints import is_former
from runtime.manifest import Engine, Manifest, Precision, Variant
from runtime.preprocessing.image import decode
from runtime.probes import Probes

__all__ = ["Kept", "kept_variants"]

_SAME = limits_of(Precision.FP32, Engine.ONNXRUNTIME).max_abs_error
"""Maximum difference between PyTorch's vectors for two exports of the same checkpoint."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Variants to keep, and the reasons for dropping others, by key."""

    variants: Mapping[str, Variant] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def kept_variants(
    published: Manifest | None, repository: Path, towers: Towers, expected: Expectations
) -> Kept:
    """Keep the variants of an earlier export if it has the same embedding space.

    The fingerprints must be equal, and PyTorch's stored vectors of its probes must match those computed now.
    An export with a fingerprint of the former kind must match in all probes, the tokenizer and the settings.

    Args:
        published: The earlier export's manifest.
        expected: The library's results for the new export's probes.
    """
    if published is None:
        return Kept()
    former = is_former(published.fingerprint)
    if not former and published.fingerprint != towers.fingerprint:
        reason: str | None = f"it has another embedding space, {published.fingerprint}"
    elif former:
        reason = _former_difference(published, repository, towers, expected)
    else:
        reason = _difference_from_expected(published, repository, expected, towers.dim)
    if reason is None:
        return Kept(published.variants)
    return Kept(dropped=dict.fromkeys(published.variants, reason))


def _former_difference(
    published: Manifest, repository: Path, towers: Towers, expected: Expectations
) -> str | None:
    """Return why an export with a former fingerprint may differ in embedding space; None if proven equal."""
    unproven = f"its fingerprint, {published.fingerprint}, is of the former kind, and"
    settings = (published.text, published.image, published.dim, published.mrl_dims)
    if settings != (towers.text_preprocessing, towers.image_preprocessing, towers.dim, towers.mrl_dims):
        return f"{unproven} its preprocessing or its dimensions differ"
    try:
        for variant in published.variants.values():
            tokenizer = json.loads((repository / variant.tokenizer).read_text(encoding="utf-8"))
            if tokenizer != json.loads(towers.tokenizer_json):
                return f"{unproven} its tokenizer differs"
        probes = Probes.read(repository / published.name)
        if probes.fingerprint != published.fingerprint:
            return f"{unproven} its probes belong to another export"
        images = [decode(image, name=f"probe {i}") for i, image in enumerate(probes.images)]
        texts = towers.reference.embed_texts(probes.texts, probes.languages)
        largest = max(
            _largest(probes.text_vectors, texts),
            _largest(probes.image_vectors, towers.reference.embed_images(images)),
        )
    except (BabeltowerError, OSError, ValueError) as error:
        return f"{unproven} its probes cannot be compared ({error})"
    if not largest <= _SAME:
        return f"{unproven} PyTorch's vectors of its probes differ by {largest:.1e}"
    return None


def _difference_from_expected(
    published: Manifest, repository: Path, expected: Expectations, dim: int
) -> str | None:
    """Compare the probes common to both exports; None if they agree or none can be compared."""
    try:
        probes = Probes.read(repository / published.name)
    except ManifestError:
        return None
    if probes.fingerprint != published.fingerprint:
        return None
    row = {(probe.text, probe.language): i for i, probe in enumerate(expected.probes)}
    asked = list(zip(probes.texts, probes.languages, strict=True))
    shared = [(old, row[both]) for old, both in enumerate(asked) if both in row]
    if not shared:
        return None
    old, new = (list(rows) for rows in zip(*shared, strict=True))
    largest = _largest(probes.text_vectors[old], expected.texts[dim][new])
    return None if largest <= _SAME else f"PyTorch's vectors of its probes differ by {largest:.1e}"


def _largest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")
