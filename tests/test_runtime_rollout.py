"""The probe set as a file, and the gate's judgement of answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import ManifestError
from runtime.manifest import Precision
from runtime.probes import Probes, probes_path
from runtime.rollout.gate import LIMITS, verdict_of_vectors

DIM = 32


def unit(n: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def probes() -> Probes:
    codes = ("eng_Latn", "por_Latn", "zho_Hans")
    return Probes(
        fingerprint="bt1:a",
        texts=("", " ", "a\0", "gato", "猫", "\0\0", "e\u0301", "x", "y"),
        languages=tuple(code for code in codes for _ in range(3)),
        images=(b"\0one\0", b"", b"three"),
        text_vectors=unit(9, 0),
        image_vectors=unit(3, 1),
    )


def test_probes_come_back_whole(probes: Probes, tmp_path: Path) -> None:
    probes.save(probes_path(tmp_path / "m"))
    read = Probes.read(tmp_path / "m")
    for field in dataclasses.fields(Probes):
        assert np.array_equal(getattr(read, field.name), getattr(probes, field.name)), field.name
    assert [path.name for path in tmp_path.iterdir()] == ["m.probes.npz"]


@pytest.mark.parametrize("content", [b"", b"PK", b"not a file of numpy"])
def test_damaged_probes_are_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is missing"):
        Probes.read(tmp_path / "m")
    probes_path(tmp_path / "m").write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be read"):
        Probes.read(tmp_path / "m")


def test_right_answers_hold(probes: Probes) -> None:
    noise = np.float32(1e-7)
    for limits in LIMITS.values():
        verdict = verdict_of_vectors(probes.text_vectors + noise, probes.image_vectors, probes, limits)
        assert verdict.holds
        assert verdict.images == pytest.approx(1)


def test_the_worst_languages_are_named_first(probes: Probes) -> None:
    texts = probes.text_vectors.copy()
    texts[3:6] = unit(3, 7)
    texts[8] = -texts[8]
    verdict = verdict_of_vectors(texts, probes.image_vectors, probes, LIMITS[Precision.INT8])
    assert not verdict.holds
    (fault,) = verdict.faults
    assert fault.startswith("2 of 3 languages")
    assert fault.index("por_Latn") < fault.index("zho_Hans")
    assert "eng_Latn" not in fault


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_wrong_images_do_not_hold(probes: Probes, broken: float) -> None:
    images = probes.image_vectors.copy()
    images[1] = broken
    verdict = verdict_of_vectors(probes.text_vectors, images, probes, LIMITS[Precision.INT8])
    assert "number 1" in verdict.faults[0]
