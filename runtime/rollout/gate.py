"""Are a server's answers to the probes those of PyTorch, language by language?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import Encoder
from runtime.manifest import Precision
from runtime.probes import Probes

__all__ = ["LIMITS", "Limits", "Verdict", "verdict_of_encoder", "verdict_of_vectors"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the answers must hold: the lowest cosine of any probe, and the mean of any language."""

    min_cosine: float
    min_language_mean: float


LIMITS: Mapping[Precision, Limits] = MappingProxyType(
    {
        Precision.FP32: Limits(0.999999, 0.999999),
        Precision.FP16: Limits(0.999, 0.9995),
        Precision.BF16: Limits(0.98, 0.99),
        Precision.INT8: Limits(0.8, 0.96),
        Precision.FP8: Limits(0.8, 0.96),
    }
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How near the answers are.

    Attributes:
        languages: Mean cosine of each language's probes.
        lowest: Lowest cosine of each language's probes.
        images: Mean cosine of the images.
        faults: What does not hold, worst first; empty if all does.
    """

    languages: Mapping[str, float]
    lowest: Mapping[str, float]
    images: float
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the version may be switched to."""
        return not self.faults


def verdict_of_encoder(encoder: Encoder, probes: Probes, precision: Precision) -> Verdict:
    """Ask an encoder all probes."""
    return verdict_of_vectors(
        encoder.embed_texts(probes.texts, probes.languages),
        encoder.embed_images(probes.images),
        probes,
        LIMITS[precision],
    )


def verdict_of_vectors(
    texts: NDArray[np.float32], images: NDArray[np.float32], probes: Probes, limits: Limits
) -> Verdict:
    """Compare float32 (probes, dim) with the reference."""
    cosines = _cosines(texts, probes.text_vectors)
    codes = np.asarray(probes.languages)
    by_language = {code: cosines[codes == code] for code in sorted(set(probes.languages))}
    means = {code: float(found.mean()) for code, found in by_language.items()}
    lowest = {code: float(found.min()) for code, found in by_language.items()}
    image_cosines = _cosines(images, probes.image_vectors)
    bad = [c for c in means if means[c] < limits.min_language_mean or lowest[c] < limits.min_cosine]
    faults = []
    if bad:
        worst = sorted(bad, key=lambda code: means[code])[:_SHOWN]
        figures = ", ".join(f"{code} at {means[code]:.4f} (lowest {lowest[code]:.4f})" for code in worst)
        faults.append(
            f"{len(bad)} of {len(means)} languages are under a mean cosine of {limits.min_language_mean} "
            f"or a lowest of {limits.min_cosine}; the worst: {figures}"
        )
    if image_cosines.mean() < limits.min_language_mean or image_cosines.min() < limits.min_cosine:
        worst_image = int(image_cosines.argmin())
        faults.append(
            f"images are at a mean cosine of {image_cosines.mean():.4f}, the worst, number {worst_image}, at "
            f"{image_cosines[worst_image]:.4f}; the limits are {limits.min_language_mean} and "
            f"{limits.min_cosine}"
        )
    return Verdict(means, lowest, float(image_cosines.mean()), tuple(faults))


def _cosines(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    cosines: NDArray[np.float64] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.nan_to_num(cosines, nan=-1.0)
