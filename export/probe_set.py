"""The probe set that stays with a model: what the family's own library makes of the probes."""

from __future__ import annotations

from export.expectations import Expected
from export.towers import Towers
from runtime.probes import Probes
from runtime.remote.payloads import bytes_from_image

__all__ = ["probes_from_expected"]


def probes_from_expected(expected: Expected, towers: Towers) -> Probes:
    """Texts, image files without loss, and their vectors at full width."""
    return Probes(
        fingerprint=towers.fingerprint,
        texts=tuple(probe.text for probe in expected.probes),
        languages=tuple(probe.language for probe in expected.probes),
        images=tuple(bytes_from_image(image, name=f"{i}") for i, image in enumerate(expected.images)),
        text_vectors=expected.texts[towers.dim],
        image_vectors=expected.image_vectors[towers.dim],
    )
