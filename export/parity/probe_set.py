"""Probes stored with a model: inputs, PyTorch's vectors and each engine's cosines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity.expectations import Expectations
from export.towers import Towers
from runtime.backends import open_backend
from runtime.device import Device
from runtime.manifest import Engine, Modality, TowerFiles, Variant, record_of_file
from runtime.opening.model_check import opening_path
from runtime.opening.probes import OpeningProbes, space_of_manifest
from runtime.opening.tower_check import opening_cosines
from runtime.preprocessing.batching import lengths_of_rows
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.probes import Probes, opening_images, opening_texts, token_runs
from runtime.remote.payloads import bytes_from_image

__all__ = ["probes_from_expected", "with_opening_probes"]


def probes_from_expected(expected: Expectations, towers: Towers) -> Probes:
    """Collect texts, losslessly encoded images, and their vectors at full width."""
    return Probes(
        fingerprint=towers.fingerprint,
        texts=tuple(probe.text for probe in expected.probes),
        languages=tuple(probe.language for probe in expected.probes),
        images=tuple(bytes_from_image(image, name=f"{i}") for i, image in enumerate(expected.images)),
        text_vectors=expected.texts[towers.dim],
        image_vectors=expected.image_vectors[towers.dim],
    )


def with_opening_probes(
    variant: Variant,
    expected: Expectations,
    towers: Towers,
    stage: Path,
    *,
    engines: Sequence[Engine],
    device: Device | None = None,
) -> Variant:
    """Write ``opening.npz`` beside each graph of a variant: probes, PyTorch's vectors, engines' cosines.

    Returns:
        The variant with records of the new files, and the cosines as ``parity["opening"]``.

    Raises:
        EngineError: a graph cannot be opened or run.
    """
    measured: dict[str, Any] = {}
    for modality in Modality:
        tower = variant.tower(modality)
        probes = _opening_probes(modality, tower, expected, towers)
        figures = {
            engine.value: _figures(variant, tower, probes, stage, engine=engine, device=device)
            for engine in engines
        }
        path = opening_path(stage, tower)
        dataclasses.replace(probes, figures=figures, measured_on=variant.measured_on).save(path)
        files = (*tower.files, record_of_file(stage, path))
        changes: dict[str, Any] = {modality.value: dataclasses.replace(tower, files=files)}
        variant = dataclasses.replace(variant, **changes)
        names = [probes.name_of_row(row) for row in range(probes.n_rows)]
        measured[modality.value] = {"probes": names, "engines": _plain(figures)}
    return dataclasses.replace(variant, parity={**variant.parity, "opening": measured})


def _plain(figures: Mapping[str, Mapping[str, tuple[float, ...]]]) -> dict[str, dict[str, list[float]]]:
    return {engine: {name: list(row) for name, row in found.items()} for engine, found in figures.items()}


def _figures(
    variant: Variant,
    tower: TowerFiles,
    probes: OpeningProbes,
    stage: Path,
    *,
    engine: Engine,
    device: Device | None,
) -> Mapping[str, tuple[float, ...]]:
    graph = stage / tower.model / str(tower.version) / tower.graph
    backend = open_backend(engine, graph, precision=variant.precision, device=device)
    try:
        return opening_cosines(backend, probes)
    finally:
        backend.close()


def _opening_probes(
    modality: Modality, tower: TowerFiles, expected: Expectations, towers: Towers
) -> OpeningProbes:
    """Select opening probes; the selection depends only on PyTorch's vectors, so variants share it."""
    widths = {int(width): name for width, name in tower.outputs.items()}
    if modality is Modality.IMAGE:
        rows = opening_images(expected.image_vectors[towers.dim])
        images = tuple(bytes_from_image(expected.images[row], name=f"{row}") for row in rows)
        size = towers.image_preprocessing
        pixels = np.stack([pixels_from_image(decode(image), size) for image in images])
        vectors = _of_rows(rows, expected.image_vectors, widths)
        space = space_of_manifest(towers.fingerprint, size)
        return OpeningProbes(modality, ({"pixels": pixels},), vectors, images=images, space=space)
    texts, languages = [p.text for p in expected.probes], [p.language for p in expected.probes]
    lengths = lengths_of_rows(expected.ids, towers.text_preprocessing).tolist()
    rows = opening_texts(texts, languages, lengths, expected.texts[towers.dim])
    ids = [expected.ids[row, : lengths[row]].tolist() for row in rows]
    return OpeningProbes(
        modality,
        token_runs(ids, towers.text_preprocessing),
        _of_rows(rows, expected.texts, widths),
        texts=tuple(texts[row] for row in rows),
        languages=tuple(languages[row] for row in rows),
        space=space_of_manifest(towers.fingerprint, towers.text_preprocessing),
    )


def _of_rows(
    rows: Sequence[int], vectors: Mapping[int, NDArray[np.float32]], widths: Mapping[int, str]
) -> dict[str, NDArray[np.float32]]:
    return {name: vectors[width][list(rows)] for width, name in widths.items()}
