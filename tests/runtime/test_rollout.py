"""The probe set as a file, and the gate's judgement of answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import ManifestError
from runtime.manifest import (
    Engine,
    FrontEnds,
    ImagePreprocessing,
    KeptVersion,
    Manifest,
    Modality,
    Precision,
    TextPreprocessing,
    TowerFiles,
    Variant,
    manifest_path,
)
from runtime.probes import Probes, probes_path
from runtime.rollout.gate import ProbeLimits, limits_from_variant, verdict_of_vectors
from runtime.rollout.kept import release_from_version
from runtime.rollout.release import release_from_model
from runtime.triton_config import config_of_folder, served_version

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


STRICT = ProbeLimits(min_cosine=0.999999, min_mean=0.999999)
LOOSE = ProbeLimits(min_cosine=0.8, min_mean=0.98)


@pytest.mark.parametrize("limits", [STRICT, LOOSE])
def test_right_answers_hold(probes: Probes, limits: ProbeLimits) -> None:
    noise = np.float32(1e-7)
    verdict = verdict_of_vectors(probes.text_vectors + noise, probes.image_vectors, probes, limits)
    assert verdict.holds
    assert verdict.images == pytest.approx(1)


def test_the_worst_languages_are_named_first(probes: Probes) -> None:
    texts = probes.text_vectors.copy()
    texts[3:6] = unit(3, 7)
    texts[8] = -texts[8]
    verdict = verdict_of_vectors(texts, probes.image_vectors, probes, LOOSE)
    assert not verdict.holds
    (fault,) = verdict.faults
    assert fault.startswith("2 of 3 languages")
    assert fault.index("por_Latn") < fault.index("zho_Hans")
    assert "eng_Latn" not in fault


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_wrong_images_do_not_hold(probes: Probes, broken: float) -> None:
    images = probes.image_vectors.copy()
    images[1] = broken
    verdict = verdict_of_vectors(probes.text_vectors, images, probes, LOOSE)
    assert "number 1" in verdict.faults[0]


def parity(mean: float = 0.99, images: float = 0.9999) -> dict[str, object]:
    """As an export records it, of two engines."""
    figures = [
        {"languages": {"por_Latn": {"mean_cosine": m}, "zho_Hans": {"mean_cosine": 0.999}},
         "image": {"mean_cosine": images}}
        for m in (mean, 0.995)
    ]  # fmt: skip
    limits = {"min_cosine": 0.8, "max_row_error": 1e-3, "retrieval": {"min_mean_cosine": 0.98}}
    return {"limits": limits, "engines": {"a": figures[0], "b": figures[1]}}


def variant(key: str, version: int, found: dict[str, object] | None = None) -> Variant:
    def files(modality: Modality) -> TowerFiles:
        return TowerFiles(f"m_{modality.value}_tower_{key}", version, "model.onnx", (), {}, 18, 10, 8, ())

    text, image = (files(modality) for modality in Modality)
    precision = Precision(key.partition("_")[0])
    evidence = parity() if found is None else found
    return Variant(precision, ("onnxruntime",), text, image, "t.json", evidence, {}, {}, {}, "")


def test_the_limits_are_those_that_the_variant_was_published_under() -> None:
    limits = limits_from_variant(variant("int8_onnxruntime", 1, parity(mean=0.97, images=0.975)))
    assert (limits.min_cosine, limits.min_mean, limits.slack) == (0.8, 0.98, 1e-3)
    assert limits.min_language_mean("zho_Hans") == 0.98
    assert limits.min_language_mean("por_Latn") == pytest.approx(
        0.969
    )  # what the export measured, less slack
    assert limits.min_language_mean("never_Seen") == 0.98
    assert limits.min_images_mean == pytest.approx(0.974)


@pytest.mark.parametrize("precision", Precision)
def test_what_was_measured_above_the_limit_does_not_lower_it(precision: Precision) -> None:
    from export.parity.limits import limits_of

    said = dataclasses.asdict(limits_of(precision, Engine.ONNXRUNTIME))
    limits = limits_from_variant(variant("fp32", 1, parity(mean=1.0, images=1.0) | {"limits": said}))
    assert limits.min_language_mean("never_Seen") == limits.min_mean
    assert (
        limits.min_images_mean
        == limits.min_mean
        == limits_of(precision, Engine.ONNXRUNTIME).retrieval.min_mean_cosine
    )


@pytest.mark.parametrize("missing", [{}, {"limits": {}, "engines": {}}, {"limits": None, "engines": []}])
def test_a_manifest_without_limits_is_an_error(missing: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match="lacks the limits"):
        limits_from_variant(variant("fp32", 1, missing))


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_records_what_a_rollout_reads(precision: Precision) -> None:
    from export.parity.limits import limits_of

    said = dataclasses.asdict(limits_of(precision, Engine.ONNXRUNTIME))
    limits = limits_from_variant(variant("fp32", 1, parity() | {"limits": said}))
    assert limits.min_cosine == limits_of(precision, Engine.ONNXRUNTIME).min_cosine
    assert limits.min_mean == limits_of(precision, Engine.ONNXRUNTIME).retrieval.min_mean_cosine


TEXT = TextPreprocessing(16, 1, (), (2,), "none")
IMAGE = ImagePreprocessing(4, 4, "squash", "bicubic", "resize-convert", "round", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A model that serves version 3, of INT8, and kept version 1, of FP32."""
    for folder, version in (
        ("m_text", 1), ("m_text", 3), ("m_image", 1), ("m_image", 3),
        ("m_text_tower_fp32", 1), ("m_image_tower_fp32", 1),
        ("m_text_tower_int8_openvino", 3), ("m_image_tower_int8_openvino", 3),
    ):  # fmt: skip
        (tmp_path / folder / str(version)).mkdir(parents=True)
        engine = "openvino" if "int8" in folder else "onnxruntime" if "tower" in folder else "python"
        pinned = f"version_policy {{ specific {{ versions: [ {version} ] }} }}"
        (tmp_path / folder / "config.pbtxt").write_text(f'name: "{folder}"\nbackend: "{engine}"\n{pinned}\n')
    manifest = Manifest(
        name="m", family="capivara", architecture="", dim=DIM, mrl_dims=(), fingerprint="bt1:a",
        licence="MIT", languages=(), text=TEXT, image=IMAGE, source={},
        variants={"fp32": variant("fp32", 1), "int8_openvino": variant("int8_openvino", 3)},
        front_ends=(FrontEnds("int8_openvino", "m_text", "m_image", ()),),
        kept=(KeptVersion(1, "fp32", variant("fp32", 1)),),
    )  # fmt: skip
    manifest_path(tmp_path / "m").write_text(manifest.to_json())
    assert Manifest.read(tmp_path / "m") == Manifest.from_json(manifest.to_json())
    return tmp_path / "m"


def test_a_kept_version_is_planned_from_its_own_files(kept: Path, tmp_path: Path) -> None:
    release = release_from_version(kept, 1)
    assert (release.version, release.served, release.key) == (1, 3, "fp32")
    assert [release.tower_folder(m).name for m in Modality] == ["m_text_tower_fp32", "m_image_tower_fp32"]
    assert release.front_end_facts(Modality.TEXT)["babeltower_engine"] == "onnxruntime"
    added, drafts = tmp_path / "added", tmp_path / "drafts"
    added.mkdir()
    drafts.mkdir()
    release.write_folders(added)
    assert sorted(path.name for path in added.iterdir()) == ["m_candidate_image", "m_candidate_text"]
    assert served_version(added / "m_candidate_text") == 1
    assert [folder.name for folder in release.added_folders(Modality.TEXT)] == ["m_candidate_text"]
    release.write_served_configs(drafts)
    assert served_version(kept.with_name("m_text")) == 3
    pinned = [
        config_of_folder(drafts / name).version_policy.specific.versions
        for name in ("m_text", "m_image", "m_text_tower_fp32", "m_image_tower_fp32")
    ]
    assert pinned == [[1]] * 4
    finished = release.finished_manifest(drafts)
    assert finished.front_ends[0].variant == "fp32"
    assert [(k.version, k.key) for k in finished.kept] == [(3, "int8_openvino")]


def test_the_next_version_comes_after_all_that_are_kept(kept: Path) -> None:
    release = release_from_model(kept, kept, "fp32")
    assert (release.version, release.served) == (4, 3)


@pytest.mark.parametrize(
    ("version", "message"), [(3, "already serves version 3"), (2, r"has no version 2.*kept \[1\]")]
)
def test_versions_that_cannot_be_switched_to(kept: Path, version: int, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        release_from_version(kept, version)


def test_a_kept_version_whose_files_are_gone_is_said(kept: Path) -> None:
    (kept.with_name("m_image_tower_fp32") / "1").rmdir()
    with pytest.raises(ManifestError, match=r"m_image_tower_fp32/1 is missing"):
        release_from_version(kept, 1)
