"""Towers of an open encoder that are released and opened again."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_models import Exported

from runtime.errors import ManifestError
from runtime.local import LocalEncoder
from runtime.manifest import Modality
from samples import dataset

TEXTS = ["um gato preto", "猫", "a cat"]
LANGUAGES = ["por_Latn", "jpn_Jpan", "eng_Latn"]


@pytest.fixture
def model(exported: Exported, tmp_path: Path) -> Path:
    """A copy of a model, to change."""
    source = exported("capivara")
    for path in source.parent.iterdir():
        if re.match(r"capivara(?!-lora)", path.name):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, tmp_path / path.name)
    return tmp_path / "capivara"


def test_a_released_tower_is_opened_by_its_next_use(model: Path) -> None:
    pictures = [dataset.load_gallery()[0].png]
    with LocalEncoder.from_repository(model, threads=1) as encoder:
        texts, images = encoder.embed_texts(TEXTS, LANGUAGES), encoder.embed_images(pictures)
        for modality in Modality:
            assert encoder.is_tower_open(modality)
            encoder.release_tower(modality)
            assert not encoder.is_tower_open(modality)
            encoder.release_tower(modality)
        np.testing.assert_array_equal(encoder.embed_texts(TEXTS, LANGUAGES), texts)
        assert not encoder.is_tower_open(Modality.IMAGE)
        np.testing.assert_array_equal(encoder.embed_images(pictures), images)


def test_released_tokens_are_read_again(model: Path) -> None:
    with LocalEncoder.from_repository(model, threads=1) as encoder:
        long = "um gato preto " * 5_000
        shortened = encoder.shortened_text(long)
        encoder.release_tower(Modality.TEXT)
        assert encoder.shortened_text(long) == shortened
        encoder.release_tower(Modality.TEXT)
        for path in model.parent.rglob("tokenizer.json"):
            path.unlink()
        with pytest.raises(ManifestError, match=r"Tokenizer .* is missing"):
            encoder.shortened_text(long)


@pytest.mark.parametrize("change", ["replaced", "touched", "removed"])
def test_a_tower_whose_files_changed_since_they_were_verified_is_not_opened(change: str, model: Path) -> None:
    with LocalEncoder.from_repository(model, threads=1) as encoder:
        encoder.embed_texts(TEXTS)
        (graph,) = model.parent.glob("capivara_image_tower_*/1/model.onnx")
        content = graph.read_bytes()
        if change == "touched":
            os.utime(graph, ns=(0, 0))
        else:
            graph.unlink()
        if change == "replaced":
            graph.write_bytes(content)
        with pytest.raises(ManifestError, match="was changed after the model was opened"):
            encoder.embed_images([dataset.load_gallery()[0].png])
        assert len(encoder.embed_texts(TEXTS)) == len(TEXTS)
