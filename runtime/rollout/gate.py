"""Comparison of a server's probe answers with PyTorch's vectors, by language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import row_cosines
from runtime.encoder import Encoder
from runtime.errors import ManifestError
from runtime.manifest import Variant
from runtime.probes import Probes

__all__ = ["ProbeLimits", "ProbeVerdict", "limits_from_variant", "verdict_of_encoder", "verdict_of_vectors"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    """Limits on the cosines of the answers; see ``limits_from_variant``.

    Attributes:
        min_cosine: Lowest cosine allowed for any probe.
        min_mean: Lowest mean cosine allowed over a language's probes, and over the images.
        measured: Mean cosine at export, by language. In a low precision it may be below ``min_mean``, a limit
            meant for whole retrieval sets, since there are few probes.
        measured_images: Mean cosine of the images at export.
        slack: Allowed distance below a measured mean that is itself below ``min_mean``.
    """

    min_cosine: float
    min_mean: float
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_images: float = 1.0
    slack: float = 0.0

    def min_language_mean(self, code: str) -> float:
        """Return the lowest mean cosine allowed over a language's probes."""
        return self._required(self.measured.get(code, 1.0))

    @property
    def min_images_mean(self) -> float:
        """Lowest mean cosine allowed over the images."""
        return self._required(self.measured_images)

    def _required(self, measured: float) -> float:
        return self.min_mean if measured >= self.min_mean else measured - self.slack


def limits_from_variant(variant: Variant) -> ProbeLimits:
    """Read a variant's export limits and measured figures from its manifest.

    With several engines, the lowest figure of each language is used.

    Raises:
        ManifestError: the manifest lacks them.
    """
    try:
        said, engines = variant.parity["limits"], list(variant.parity["engines"].values())
        codes = {code for engine in engines for code in engine["languages"]}
        return ProbeLimits(
            min_cosine=float(said["min_cosine"]),
            min_mean=float(said["retrieval"]["min_mean_cosine"]),
            measured={
                code: min(
                    float(engine["languages"][code]["mean_cosine"])
                    for engine in engines
                    if code in engine["languages"]
                )
                for code in codes
            },
            measured_images=min(float(engine["image"]["mean_cosine"]) for engine in engines),
            slack=float(said["max_row_error"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"The manifest of {variant.text.model} lacks the limits or figures of its export "
            f"({type(error).__name__}: {error}). Export the checkpoint again."
        ) from error


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """Cosines of the answers, and their faults.

    Attributes:
        languages: Mean cosine of each language's probes.
        lowest: Lowest cosine of each language's probes.
        images: Mean cosine of the images.
        faults: Violated limits, in words, worst language first; empty if all answers pass.
    """

    languages: Mapping[str, float]
    lowest: Mapping[str, float]
    images: float
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True if all limits hold, so the version may be switched to."""
        return not self.faults


def verdict_of_encoder(encoder: Encoder, probes: Probes, limits: ProbeLimits) -> ProbeVerdict:
    """Embed all probes with an encoder and compare the answers."""
    return verdict_of_vectors(
        encoder.embed_texts(probes.texts, probes.languages),
        encoder.embed_images(probes.images),
        probes,
        limits,
    )


def verdict_of_vectors(
    texts: NDArray[np.float32], images: NDArray[np.float32], probes: Probes, limits: ProbeLimits
) -> ProbeVerdict:
    """Compare vectors of the probes, float32 (probes, dim), with the reference."""
    cosines = _cosines(texts, probes.text_vectors)
    codes = np.asarray(probes.languages)
    by_language = {code: cosines[codes == code] for code in sorted(set(probes.languages))}
    means = {code: float(found.mean()) for code, found in by_language.items()}
    lowest = {code: float(found.min()) for code, found in by_language.items()}
    image_cosines = _cosines(images, probes.image_vectors)
    bad = [
        c for c in means if not (means[c] >= limits.min_language_mean(c) and lowest[c] >= limits.min_cosine)
    ]
    faults = []
    if bad:
        worst = sorted(bad, key=lambda code: means[code])[:_SHOWN]
        figures = ", ".join(f"{code} at {means[code]:.4f} (lowest {lowest[code]:.4f})" for code in worst)
        faults.append(
            f"{len(bad)} of {len(means)} languages are below a mean cosine of {limits.min_mean} (or the "
            f"export's) or a lowest cosine of {limits.min_cosine}; the worst: {figures}"
        )
    if not (image_cosines.mean() >= limits.min_images_mean and image_cosines.min() >= limits.min_cosine):
        worst_image = int(image_cosines.argmin())
        faults.append(
            f"images have a mean cosine of {image_cosines.mean():.4f}, and the worst, number {worst_image}, "
            f"has {image_cosines[worst_image]:.4f}; the limits are {limits.min_images_mean:.6f} and "
            f"{limits.min_cosine}"
        )
    return ProbeVerdict(means, lowest, float(image_cosines.mean()), tuple(faults))


def _cosines(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return row cosines; -1 for vectors that are zero or not finite, which have none."""
    return np.nan_to_num(row_cosines(found, expected), nan=-1.0)
