"""Measure the parity of an exported model with PyTorch, on the serving runtime, before publishing.

The reference is the family's own library, unmodified: its tokenizer, its preprocessing, its model. Four
comparisons are made, each with a figure in the manifest: token ids; pixels; vectors, by language, by image
and over batch and sequence sizes; and a row alone against the same row in a batch. A fifth, retrieval, is in
``export/parity/gate.py``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity.expectations import Expectations, ExpectedRun, channel_statistics
from export.parity.gate import GateReference, NoiseFloor, RetrievalFigures, measure_retrieval
from export.parity.limits import Limits
from export.parity.probes import ProbeText
from export.retrieval.comparison import Direction
from export.retrieval.vectors import Progress
from export.retrieval.verdict import retrieval_failures
from export.towers import Float, Towers
from runtime.backends import open_backend, version_of_engine
from runtime.cosines import highest, lowest, row_cosines, worst_rows
from runtime.device import Device
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Manifest, Modality, Precision
from runtime.opening.tower_check import Checks
from runtime.preprocessing.image import pixels_from_source
from runtime.preprocessing.text import Tokenizer, texts_with_languages

__all__ = [
    "Agreement",
    "EngineFigures",
    "ParityReport",
    "agreement",
    "agreement_by_language",
    "measure_parity",
    "versions_of_reference",
]

_N_ALONE = 12


@dataclass(frozen=True, slots=True)
class Agreement:
    """Row-wise agreement of two sets of vectors; ``worst`` names the row with the lowest cosine."""

    n: int
    max_abs_error: float
    min_cosine: float
    mean_cosine: float
    worst: str


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Agreement of one engine with the reference, over all widths; languages at full width only.

    ``row_alone`` is the largest change of any component between a text alone and in a batch.
    """

    text: Agreement
    image: Agreement
    languages: Mapping[str, Agreement]
    shapes: Mapping[str, Agreement]
    row_alone: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All parity measurements of a variant; ``engines`` and ``retrieval`` are keyed by engine."""

    reference: str
    precision: str
    limits: Limits
    n_texts: int
    n_images: int
    token_ids_equal: bool
    max_pixel_error: float
    engines: Mapping[str, EngineFigures]
    retrieval: Mapping[str, RetrievalFigures]
    noise: NoiseFloor | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        figures = dataclasses.asdict(dataclasses.replace(self, retrieval={}))
        figures["retrieval"] = {engine: found.as_json() for engine, found in self.retrieval.items()}
        return figures

    def violations(self) -> list[str]:
        """List the violated limits; retrieval first, starting with the worst languages."""
        found = [] if self.token_ids_equal else ["token ids differ from the reference tokenizer's"]
        if not self.max_pixel_error <= self.limits.max_pixel_error + 1e-6:
            found.append(
                f"pixels differ by {self.max_pixel_error:.5f} (limit {self.limits.max_pixel_error:.5f})"
            )
        for engine, retrieval in self.retrieval.items():
            faults = retrieval_failures(retrieval.languages, retrieval.images, self.limits.retrieval)
            found += [f"{engine}: {fault}" for fault in faults]
        for engine, figures in self.engines.items():
            found += [f"{engine}: {fault}" for fault in self._faults_of_engine(figures)]
        return found

    def worst_languages(self, n: int = 3) -> list[str]:
        """List the largest drops of recall at 1, in descending order: language, direction, engine, points."""
        drops = [
            (100 * figures.comparison(direction).drop(1), figures.code, direction.value, engine)
            for engine, retrieval in self.retrieval.items()
            for figures in retrieval.languages
            for direction in Direction
        ]
        worst = sorted(drops, key=lambda entry: (-entry[0], entry[1:]))[:n]
        return [
            f"{code}, {direction}, {engine}: {drop:.2f} points lost"
            for drop, code, direction, engine in worst
        ]

    def _faults_of_engine(self, figures: EngineFigures) -> Iterator[str]:
        if not figures.row_alone <= self.limits.max_row_error:
            yield f"a text alone differs from the same text in a batch by {figures.row_alone:.2e}"
        parts = {"text": figures.text, "image": figures.image, **figures.languages, **figures.shapes}
        for part, measured in parts.items():
            if not measured.max_abs_error <= self.limits.max_abs_error:
                yield (
                    f"{part}: error {measured.max_abs_error:.2e} above the limit of "
                    f"{self.limits.max_abs_error:.0e}"
                )
            if not measured.min_cosine >= self.limits.min_cosine:
                yield (
                    f"{part}: cosine {measured.min_cosine:.7f} below the limit of {self.limits.min_cosine} "
                    f"at {measured.worst!r}"
                )


def measure_parity(
    towers: Towers,
    repository: Path,
    manifest: Manifest,
    precision: Precision,
    *,
    engines: Sequence[Engine],
    device: Device | None,
    limits: Limits,
    expected: Expectations,
    gate: GateReference | None,
    threads: int | None,
    progress: Progress,
) -> ParityReport:
    """Compare an exported variant with the family's own library.

    Args:
        repository: Folder with the manifest and its files.
        engines: Engines to measure, each in turn.
        device: GPU to measure on, for an engine that runs on one; None for the engine's own.
        expected: The library's results for the probes.
        gate: The library's results for a retrieval set; None skips retrieval.
    """
    variant = manifest.variant(precision, engines[0].value)
    tokenizer = Tokenizer(repository / variant.tokenizer, manifest.text)
    names = {engine: f"{engine.value} {version_of_engine(engine)}" for engine in engines}
    return ParityReport(
        reference=versions_of_reference(),
        precision=precision.value,
        limits=limits if gate is None or not gate.sampled else limits.for_a_sample(),
        n_texts=len(expected.probes),
        n_images=len(expected.images),
        token_ids_equal=_token_ids_equal(tokenizer, expected, towers.text_preprocessing.pad_id),
        max_pixel_error=_max_pixel_error(towers, expected),
        engines={
            name: _figures(expected, repository, manifest, precision, engine, device)
            for engine, name in names.items()
        },
        retrieval={}
        if gate is None
        else {
            name: measure_retrieval(
                gate,
                repository / manifest.name,
                engine=engine,
                precision=precision,
                device=device,
                threads=threads,
                progress=progress,
            )
            for engine, name in names.items()
        },
        noise=None if gate is None else gate.noise,
    )


def agreement(found: NDArray[Any], expected: NDArray[Any], names: Sequence[str]) -> Agreement:
    """Compare two float arrays (rows, dim) row by row; ``names`` are the rows' names.

    Zero or non-finite vectors give NaN cosines, which fail every limit; ``worst`` names these rows.
    """
    a, b = found.astype(np.float64), expected.astype(np.float64)
    cosines = row_cosines(a, b)
    return Agreement(
        n=len(a),
        max_abs_error=float(np.abs(a - b).max()),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        worst=worst_rows(cosines, names),
    )


def _token_ids_equal(tokenizer: Tokenizer, expected: Expectations, pad_id: int) -> bool:
    texts = list(
        texts_with_languages([p.text for p in expected.probes], [p.language for p in expected.probes])
    )
    rows = tokenizer.rows_from_texts(texts)
    context_length = expected.ids.shape[1]
    return all(
        row.ids + [pad_id] * (context_length - len(row.ids)) == ids.tolist()
        for row, ids in zip(rows, expected.ids, strict=True)
    )


def _max_pixel_error(towers: Towers, expected: Expectations) -> float:
    """Return the largest pixel difference on the scale 0 to 1, before normalisation."""
    image = towers.image_preprocessing
    mean, std = channel_statistics(image)
    ours = np.stack([pixels_from_source(source, image) for source in expected.images])
    return float(np.abs(ours / 255 - (expected.pixels * std + mean)).max())


def _figures(
    expected: Expectations,
    repository: Path,
    manifest: Manifest,
    precision: Precision,
    engine: Engine,
    device: Device | None,
) -> EngineFigures:
    texts, codes = [p.text for p in expected.probes], [p.language for p in expected.probes]
    model = repository / manifest.name
    # One encoder per tower, so that a graph is freed before the next one is opened.
    with LocalEncoder.from_repository(
        model, engine=engine, precision=precision, verify=Checks.NONE, device=device
    ) as encoder:
        text = {dim: encoder.embed_texts(texts, codes, dim=dim) for dim in expected.texts}
        alone = np.concatenate([encoder.embed_texts([t], [c]) for t, c in _spread(texts, codes)])
    with LocalEncoder.from_repository(
        model, engine=engine, precision=precision, verify=Checks.NONE, device=device
    ) as encoder:
        image = {dim: encoder.embed_images(expected.images, dim=dim) for dim in expected.texts}
    batched = np.stack([row for row, _ in _spread(text[manifest.dim], codes)])
    names = [f"probe image {i}" for i in range(len(expected.images))]
    return EngineFigures(
        text=_worst(agreement(text[dim], expected.texts[dim], texts) for dim in text),
        image=_worst(agreement(image[dim], expected.image_vectors[dim], names) for dim in image),
        languages=agreement_by_language(text[manifest.dim], expected.texts[manifest.dim], expected.probes),
        shapes=dict(_shapes(expected.cells, repository, manifest, precision, engine, device)),
        row_alone=float(np.abs(alone - batched).max()),
    )


def _spread(rows: Sequence[Any] | Float, codes: Sequence[str]) -> list[tuple[Any, str]]:
    step = max(1, len(rows) // _N_ALONE)
    return list(zip(rows[::step], codes[::step], strict=True))


def agreement_by_language(found: Float, expected: Float, probes: Sequence[ProbeText]) -> dict[str, Agreement]:
    """Compare the vectors of probes, float32 (probes, dim), language by language."""
    codes = np.array([p.language for p in probes])
    texts = np.array([p.text for p in probes], dtype=object)
    return {
        code: agreement(found[codes == code], expected[codes == code], texts[codes == code])
        for code in sorted(set(codes.tolist()))
    }


def _shapes(
    cells: Sequence[ExpectedRun],
    repository: Path,
    manifest: Manifest,
    precision: Precision,
    engine: Engine,
    device: Device | None,
) -> Iterator[tuple[str, Agreement]]:
    for modality in Modality:
        tower = manifest.variant(precision, engine.value).tower(modality)
        graph = repository / tower.model / str(tower.version) / tower.graph
        backend = open_backend(engine, graph, precision=precision, device=device)
        for cell in (cell for cell in cells if cell.modality is modality):
            outputs = backend.run(cell.inputs, [tower.outputs[str(dim)] for dim in cell.expected])
            names = [f"row {i}" for i in range(len(outputs[0]))]
            pairs = zip(outputs, cell.expected.values(), strict=True)
            yield cell.name, _worst(agreement(found, wanted, names) for found, wanted in pairs)
        backend.close()


def _worst(parts: Iterable[Agreement]) -> Agreement:
    measured = list(parts)
    return Agreement(
        n=measured[0].n,
        max_abs_error=highest(a.max_abs_error for a in measured),
        min_cosine=lowest(a.min_cosine for a in measured),
        mean_cosine=lowest(a.mean_cosine for a in measured),
        worst=measured[int(np.argmin([a.min_cosine for a in measured]))].worst,
    )


def versions_of_reference() -> str:
    """Name the packages that compute the reference, with their versions."""
    packages = ("open_clip_torch", "transformers", "torch")
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
