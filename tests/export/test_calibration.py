"""Calibration sets: balanced, repeatable, exactly what is served; and what a bad source is told."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from sample_models import ROOT, Exported

from export.precision.calibration import (
    CalibrationSet,
    CalibrationSize,
    calibration_from_folder,
    calibration_from_parquet,
    calibration_from_samples,
    samples_folder,
)
from runtime import Encoder
from runtime.errors import DatasetError
from runtime.manifest import Manifest, Modality, Precision
from runtime.preprocessing.image import pixels_from_image
from runtime.preprocessing.text import Tokenizer

SMALL = CalibrationSize(n_texts=250, n_images=20)


@pytest.fixture(scope="session")
def feeding(exported: Exported):
    """Sample name → the arguments that say how a tower is fed, and its languages."""

    def of(name: str) -> tuple[tuple, dict]:
        model = exported(name)
        manifest = Manifest.read(model)
        tokenizer = Tokenizer(model.parent / manifest.variant(Precision.FP32).tokenizer, manifest.text)
        return (tokenizer, manifest.text, manifest.image), {"languages": manifest.languages}

    return of


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


def write(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["nllb-clip", "altclip"])
def test_the_default_set_is_balanced_and_mixed(name: str, feeding) -> None:
    arguments, options = feeding(name)
    found = calibration_from_samples(*arguments, **options, size=SMALL)
    counts = Counter(found.languages.values())
    assert max(counts) - min(counts) <= 1
    assert set(found.languages) <= set(options["languages"])
    lengths = np.concatenate([batch["attention_mask"].sum(1) for batch in found.batches(Modality.TEXT)])
    assert len(lengths) == 250
    assert len(set(lengths.tolist())) > 10
    assert all((batch["attention_mask"] == 0).any() for batch in found.batches(Modality.TEXT))
    assert sum(len(batch["pixels"]) for batch in found.batches(Modality.IMAGE)) == 20


def test_it_is_repeatable_and_its_hash_follows_the_inputs(feeding) -> None:
    arguments, options = feeding("nllb-clip")

    def record(size: CalibrationSize) -> dict:
        return calibration_from_samples(*arguments, **options, size=size).as_json()

    first = record(SMALL)
    assert first == record(SMALL)
    assert first["sha256"] != record(CalibrationSize(250, 20, seed=1))["sha256"]
    assert json.loads(json.dumps(first)) == first
    assert first["n_texts"] == sum(first["languages"].values()) == 250


def test_inputs_are_what_the_encoder_sees(feeding, exported: Exported, tmp_path: Path) -> None:
    arguments, options = feeding("nllb-clip")
    path = write(tmp_path / "one.parquet", text=["gato preto"], language=["pt"], image=[png((9, 99, 200))])
    found = calibration_from_parquet(path, *arguments, **options)
    with Encoder.open(exported("nllb-clip"), threads=1) as encoder:
        expected = encoder.embed_texts(["gato preto"], "por_Latn")
        assert expected.shape[0] == len(found.batches(Modality.TEXT)[0]["input_ids"])
    image = pixels_from_image(Image.open(io.BytesIO(png((9, 99, 200)))), arguments[2])
    assert np.array_equal(found.batches(Modality.IMAGE)[0]["pixels"][0], image)
    assert found.languages == {"por_Latn": 1}


def test_a_folder_gives_images_and_the_samples_texts(feeding, tmp_path: Path) -> None:
    (tmp_path / "nested").mkdir()
    for i in range(3):
        (tmp_path / "nested" / f"{i}.png").write_bytes(png((i, i, i)))
    (tmp_path / "notes.txt").write_text("no image")
    arguments, options = feeding("altclip")
    found = calibration_from_folder(tmp_path, *arguments, **options, size=SMALL)
    assert len(found.batches(Modality.IMAGE)[0]["pixels"]) == 3
    assert str(tmp_path) not in json.dumps(found.as_json())


def test_the_default_folder_is_the_source_trees() -> None:
    assert samples_folder() == ROOT / "samples" / "emoji"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a"]}, "expected text and language"),
        ({"text": []}, "is empty"),
        ({"text": ["a"]}, "no language column"),
        ({"text": ["a"], "language": ["nowhere"]}, "nowhere"),
        ({"image": [b"no image"]}, "cannot be read"),
    ],
)
def test_a_bad_parquet_is_refused(columns: dict, message: str, feeding, tmp_path: Path) -> None:
    arguments, options = feeding("nllb-clip")
    with pytest.raises(DatasetError, match=message):
        calibration_from_parquet(write(tmp_path / "bad.parquet", **columns), *arguments, **options)


def test_other_bad_sources_are_refused(feeding, tmp_path: Path) -> None:
    arguments, options = feeding("nllb-clip")
    with pytest.raises(DatasetError, match="contains no image"):
        calibration_from_folder(tmp_path, *arguments, **options)
    with pytest.raises(DatasetError, match="is not a folder"):
        calibration_from_folder(tmp_path / "missing", *arguments, **options)
    with pytest.raises(DatasetError, match="does not exist"):
        calibration_from_parquet(tmp_path / "missing.parquet", *arguments, **options)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DatasetError, match="as Parquet"):
        calibration_from_parquet(tmp_path / "text.parquet", *arguments, **options)


def test_a_missing_kind_is_named() -> None:
    empty = CalibrationSet("a file", 0, {}, (), ())
    with pytest.raises(DatasetError, match="no data for the image tower"):
        empty.batches(Modality.IMAGE)
