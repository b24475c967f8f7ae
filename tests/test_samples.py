"""The sample checkpoints: true formats, and good enough that parity means something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_models import CHECKPOINTS, NAMES, ROOT, Exported

from bench.accuracy.evaluation import EvaluationSettings, evaluate
from bench.datasets import read
from export.retrieval.comparison import Direction
from samples import dataset

MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_small(name: str) -> None:
    size = sum(path.stat().st_size for path in (CHECKPOINTS / name).rglob("*"))
    assert size <= 10 * MEGABYTE


def test_the_data_is_small_and_complete() -> None:
    folder = ROOT / "samples" / "emoji"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10 * MEGABYTE
    gallery, training = dataset.load_gallery(), dataset.load_training_images()
    assert len(gallery) == len(training) == 1911
    assert {d.vendor for d in gallery}.isdisjoint(d.vendor for d in training)
    assert {d.png for d in gallery}.isdisjoint(d.png for d in training)
    captions = dataset.load_captions()
    languages = {c.flores for c in captions}
    assert len(languages) == 106
    assert all(sum(c.flores == language for c in captions) >= 1500 for language in ("por_Latn", "zul_Latn"))


@pytest.mark.parametrize("name", ["nllb-clip", "nllb-siglip-mrl", "capivara"])
def test_open_clip_alone_loads_the_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.chdir(ROOT)  # the folders name themselves as text model, relative to the root
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:samples/checkpoints/{name}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:samples/checkpoints/{name}")
    with torch.inference_mode():
        text = model.eval().encode_text(tokenizer(["cat"]), normalize=True)
        image = model.encode_image(transform(dataset.load_gallery()[0].image())[None], normalize=True)
    config = json.loads((CHECKPOINTS / name / "open_clip_config.json").read_text())
    assert text.shape == image.shape == (1, config["model_cfg"]["embed_dim"])


def test_peft_alone_loads_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import peft

    monkeypatch.chdir(ROOT)
    model, _, _ = open_clip.create_model_and_transforms("local-dir:samples/checkpoints/capivara")
    adapted = peft.PeftModel.from_pretrained(model.text, str(CHECKPOINTS / "capivara-lora"))
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 8)
    assert set(config.target_modules) == {"query", "value"}
    assert config.modules_to_save == ["proj"]


def test_transformers_alone_loads_the_folder() -> None:
    from transformers import AltCLIPModel, AltCLIPProcessor

    folder = str(CHECKPOINTS / "altclip")
    model, info = AltCLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AltCLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["gato"], images=[dataset.load_gallery()[0].image()], return_tensors="pt")
    assert np.isfinite(model(**inputs).logits_per_image.detach().numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_recall_is_pytorchs_in_every_language_and_means_something(name: str, exported: Exported) -> None:
    report = evaluate(CHECKPOINTS / name, exported(name), read("emoji"), EvaluationSettings()).report
    assert report.failures == ()
    assert len(report.languages) == 106
    assert report.unspoken == ()
    assert report.mean_recall_at(Direction.TEXT_TO_IMAGE, 1)[1] >= 0.44  # chance: 0.0005
    assert report.mean_recall_at(Direction.TEXT_TO_IMAGE, 10)[1] >= 0.73  # chance: 0.005


@pytest.mark.parametrize("name", ["nllb-siglip-mrl"])
def test_mrl_heads_retrieve_too(name: str, exported: Exported) -> None:
    emoji = read("emoji").select(["por_Latn", "jpn_Jpan"])
    for dim in (32, 64, 128):
        report = evaluate(CHECKPOINTS / name, exported(name), emoji, EvaluationSettings(dim=dim)).report
        assert report.failures == ()


def test_captions_know_their_language_table() -> None:
    from runtime.preprocessing.languages import flores_from_code

    pairs = {(c.flores, c.bcp47) for c in dataset.load_captions()}
    assert all(flores_from_code(bcp47) == flores for flores, bcp47 in pairs)
    assert Path(ROOT / "samples" / "LICENSES").is_dir()
