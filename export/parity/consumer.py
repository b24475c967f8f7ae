"""Parity of a layout: everything its server computes from strings and images, compared with PyTorch.

A server has its own text cleaning and image resizing, which a layout cannot change. Where these give a probe
other token ids or pixels than the family's library does, the graph is compared with PyTorch on the server's
inputs, and the probe is counted. Retrieval is compared end to end, such differences included.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from export.parity.expectations import Expectations, channel_statistics, opened_probe, text_vectors
from export.parity.gate import GateReference, figures_of_vectors
from export.parity.limits import Limits
from export.parity.measure import (
    EngineFigures,
    ParityReport,
    agreement,
    agreement_by_language,
    versions_of_reference,
)
from export.retrieval.vectors import Progress, exported_vectors
from export.towers import Float, Int, Towers
from runtime.manifest import Engine, Precision

__all__ = ["Consumer", "ConsumerParity", "measure_consumer"]

_SAME_PIXEL = 0.5 / 255


class Consumer(Protocol):
    """Model of a layout, opened as its server opens it."""

    def token_ids(self, texts: Sequence[str], languages: Sequence[str]) -> Int:
        """Return the server's token ids, int64 (texts, context length)."""

    def pixels(self, image: Image.Image) -> Float:
        """Return the server's normalised pixels of an image, float32 (3, height, width)."""

    def same_cleaning(self, text: str) -> bool:
        """Return True if the server cleans a text as the family's library does."""

    def embed_texts(
        self, texts: Iterable[str], language: Sequence[str] | None = None, *, dim: int | None = None
    ) -> Float:
        """Embed texts one by one, as the server does: float32 (texts, dim)."""

    def iter_images(self, images: Iterable[Any], *, dim: int | None, batch_size: int) -> Iterator[Float]:
        """Embed images one by one, as the server does; yield float32 (batch, dim)."""

    def close(self) -> None:
        """Release the graphs."""


@dataclass(frozen=True, slots=True)
class ConsumerParity:
    """Parity of a layout, and the probes that its server prepares in its own way.

    Attributes:
        report: The measurements. ``max_pixel_error`` is that of the images with the same pixels.
        other_texts: Probe texts that the server cleans otherwise.
        n_other_images: Number of probe images that the server resizes or converts otherwise.
    """

    report: ParityReport
    other_texts: tuple[str, ...]
    n_other_images: int

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the layout's record."""
        return {
            **self.report.as_json(),
            "other_texts": list(self.other_texts),
            "n_other_images": self.n_other_images,
        }


def measure_consumer(
    towers: Towers,
    consumer: Consumer,
    precision: Precision,
    *,
    engine: Engine,
    limits: Limits,
    expected: Expectations,
    gate: GateReference | None,
    progress: Progress,
) -> ConsumerParity:
    """Compare a layout with the family's own library.

    Args:
        expected: The library's results for the probes.
        gate: The library's results for a retrieval set; None skips retrieval.
    """
    name = f"{engine.value} {importlib.metadata.version(engine.value)}"
    texts, codes = [p.text for p in expected.probes], [p.language for p in expected.probes]
    ids = consumer.token_ids(texts, codes)
    same = (ids == expected.ids).all(axis=1)
    cleaned = np.array([consumer.same_cleaning(text) for text in texts])
    wanted = expected.texts[towers.dim].copy()
    if not same.all():
        wanted[~same] = text_vectors(towers, ids[~same])[towers.dim]
    text_found = consumer.embed_texts(texts, codes, dim=towers.dim)
    pixels = np.stack([consumer.pixels(opened_probe(image)) for image in expected.images])
    _, std = channel_statistics(towers.image_preprocessing)
    errors = np.abs((pixels - expected.pixels) * std).max(axis=(1, 2, 3))
    image_wanted = towers.reference.image_vectors(pixels)[towers.dim]
    images = (opened_probe(image) for image in expected.images)
    image_found = np.concatenate(list(consumer.iter_images(images, dim=towers.dim, batch_size=16)))
    figures = EngineFigures(
        text=agreement(text_found, wanted, texts),
        image=agreement(image_found, image_wanted, [f"probe image {i}" for i in range(len(pixels))]),
        languages=agreement_by_language(text_found, wanted, expected.probes),
        shapes={},
        row_alone=0.0,  # a server that embeds one row a run has no other
    )
    retrieval = {}
    if gate is not None:
        found = exported_vectors(consumer, gate.dataset, gate.index, dim=gate.dim, progress=progress)
        retrieval[name] = figures_of_vectors(gate, found)
    report = ParityReport(
        reference=versions_of_reference(),
        precision=precision.value,
        limits=limits if gate is None or not gate.sampled else limits.for_a_sample(),
        n_texts=len(texts),
        n_images=len(pixels),
        token_ids_equal=bool(same[cleaned].all()),
        max_pixel_error=float(max(errors[errors < _SAME_PIXEL], default=0.0)),
        engines={name: figures},
        retrieval=retrieval,
        noise=None if gate is None else gate.noise,
    )
    others = tuple(text for text, equal in zip(texts, same, strict=True) if not equal)
    return ConsumerParity(report, others, int((errors >= _SAME_PIXEL).sum()))
