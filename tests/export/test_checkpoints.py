"""Checkpoints in every published form, and damaged ones: what is read, and what is said."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_models import CHECKPOINTS

from export import towers_from_checkpoint
from export.towers import Towers
from runtime.errors import CheckpointError

CopyOf = Callable[[str], Path]


@pytest.fixture
def copy_of(tmp_path: Path) -> CopyOf:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))

    return copy


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@cache
def fingerprint_of(name: str) -> str:
    return towers_from_checkpoint(CHECKPOINTS / name).fingerprint


def text_vectors(towers: Towers) -> np.ndarray:
    ids = np.array([[towers.text_preprocessing.suffix_ids[0], 40, 50, 60, 70, 2]])
    return towers.reference.text_vectors(ids)[towers.dim]


def test_a_bin_file_is_the_same_space_as_safetensors(copy_of: CopyOf) -> None:
    folder = copy_of("capivara")
    weights = folder / "open_clip_model.safetensors"
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    weights.unlink()
    assert towers_from_checkpoint(folder).fingerprint == fingerprint_of("capivara")


@pytest.mark.parametrize("argument", ["folder", "file"])
def test_a_lightning_checkpoint_is_read(argument: str, copy_of: CopyOf) -> None:
    folder = copy_of("capivara")
    state = load_file(folder / "open_clip_model.safetensors")
    state = {f"model.model.{name}": tensor for name, tensor in state.items()}
    state["model.model.text.transformer.embeddings.position_ids"] = torch.arange(514)[None]
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}}, folder / "2kmj76gi.ckpt")
    (folder / "open_clip_model.safetensors").unlink()
    path = folder if argument == "folder" else folder / "2kmj76gi.ckpt"
    towers = towers_from_checkpoint(path)
    assert towers.family == "capivara"
    assert towers.fingerprint == fingerprint_of("capivara")


def test_an_adapter_is_merged_into_its_base() -> None:
    base, adapted = (towers_from_checkpoint(CHECKPOINTS / name) for name in ("capivara", "capivara-lora"))
    assert adapted.fingerprint != base.fingerprint
    assert float((text_vectors(base) * text_vectors(adapted)).sum()) < 0.9999
    ids = torch.tensor([[0, 40, 50, 60, 70, 2]])
    merged = adapted.text(ids, torch.ones_like(ids))[0].numpy()
    unmerged = adapted.reference.text_vectors(ids.numpy())[adapted.dim]
    assert type(adapted.reference.text).__name__ == "PeftModel"  # type: ignore[attr-defined]
    assert np.abs(merged - unmerged).max() <= 1e-6


def test_an_adapter_takes_its_base_from_the_caller(copy_of: CopyOf) -> None:
    folder = copy_of("capivara-lora")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="--base"):
        towers_from_checkpoint(folder)
    adapted = towers_from_checkpoint(folder, base=CHECKPOINTS / "capivara")
    assert adapted.fingerprint == fingerprint_of("capivara-lora")


def test_a_published_mrl_folder_is_read(copy_of: CopyOf) -> None:
    import open_clip

    folder = copy_of("nllb-siglip-mrl")
    architecture = json.loads((folder / "open_clip_config.json").read_text())
    described = folder / "nllb-clip-tiny-siglip.json"
    described.write_text(json.dumps(architecture["model_cfg"]))
    open_clip.add_model_config(described)
    config = json.loads((folder / "config.json").read_text())
    mrl = {key: config[key] for key in ("mrl_resolutions", "target_resolution")}
    state = load_file(folder / "open_clip_model.safetensors")
    heads = load_file(folder / "model.safetensors")
    save_file({**{f"model.{k}": v for k, v in state.items()}, **heads}, folder / "model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_config.json").unlink()
    # The published config.json describes the MRL model only: the text model's is found by name.
    text = {
        k: v for k, v in config.items() if k not in ("clip_model_name", "mrl_resolutions", "preprocess_cfg")
    }
    text_folder = folder / "text"
    text_folder.mkdir()
    (text_folder / "config.json").write_text(json.dumps(text))
    architecture["model_cfg"]["text_cfg"]["hf_model_name"] = str(text_folder)
    described.write_text(json.dumps(architecture["model_cfg"]))
    open_clip.add_model_config(described)
    preprocess = architecture["preprocess_cfg"]
    (folder / "config.json").write_text(
        json.dumps({**mrl, "clip_model_name": "nllb-clip-tiny-siglip", "preprocess_cfg": preprocess})
    )
    towers = towers_from_checkpoint(folder)
    original = towers_from_checkpoint(CHECKPOINTS / "nllb-siglip-mrl")
    assert towers.mrl_dims == original.mrl_dims
    assert towers.fingerprint == original.fingerprint


def test_mrl_heads_stand_on_the_embedding_before_it_is_normalised() -> None:
    towers = towers_from_checkpoint(CHECKPOINTS / "nllb-siglip-mrl")
    ids = torch.tensor([[towers.text_preprocessing.language_ids["por_Latn"], 40, 50, 2]])
    features = towers.reference.text(ids)  # type: ignore[attr-defined]
    raw = load_file(CHECKPOINTS / "nllb-siglip-mrl" / "model.safetensors")
    for dim, vector in zip(towers.mrl_dims, towers.text(ids, torch.ones_like(ids))[1:], strict=True):
        weight, bias = (raw[f"matryoshka_layer.layers.{dim}.{part}"].float() for part in ("weight", "bias"))
        expected = torch.nn.functional.normalize(features @ weight.T + bias, dim=-1)
        torch.testing.assert_close(vector, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "renamed", [("encoder.layers.", "encoder.layer."), ("encoder.layer.", "encoder.layers.")]
)
def test_altclip_with_old_and_new_key_names_is_read(renamed: tuple[str, str], copy_of: CopyOf) -> None:
    folder = copy_of("altclip")
    weights = folder / "model.safetensors"
    state = {name.replace(*renamed): tensor for name, tensor in load_file(weights).items()}
    state["text_model.roberta.embeddings.position_ids"] = torch.arange(514)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    assert any(renamed[1] in name for name in state)
    torch.save(state, folder / "pytorch_model.bin")
    weights.unlink()
    assert towers_from_checkpoint(folder).fingerprint == fingerprint_of("altclip")


def test_altclip_with_a_wider_joint_space_is_read(tmp_path: Path, copy_of: CopyOf) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel

    folder = copy_of("altclip")
    config = AltCLIPConfig.from_pretrained(folder)
    config.projection_dim = config.text_config.project_dim = 160
    AltCLIPModel(config).save_pretrained(folder)
    towers = towers_from_checkpoint(folder)
    assert towers.dim == 160
    assert text_vectors(towers).shape == (1, 160)


def test_the_licence_in_a_model_card_is_kept(copy_of: CopyOf) -> None:
    folder = copy_of("nllb-clip")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert towers_from_checkpoint(folder).licence == "mit"
    (folder / "README.md").unlink()
    assert towers_from_checkpoint(folder).licence == "CC-BY-NC-4.0"


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("a pickle ran code",)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def harmful(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    with (folder / "open_clip_pytorch_model.bin").open("wb") as file:
        pickle.dump({"visual.proj": Harm()}, file)


def other_width(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] += 32
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def one_head_short(folder: Path) -> None:
    heads = load_file(folder / "model.safetensors")
    save_file(dict(list(heads.items())[:2]), folder / "model.safetensors")


def legacy_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if "_" not in t["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[], additional_special_tokens=[])


DAMAGE = [
    ("nllb-clip", remove("open_clip_model.safetensors"), "no open_clip weights"),
    ("nllb-clip", lambda f: truncated(f / "open_clip_model.safetensors"), "cut short or corrupt"),
    ("nllb-clip", lambda f: truncated(f / "open_clip_config.json"), "not readable JSON"),
    ("nllb-clip", lambda f: truncated(f / "tokenizer.json"), "tokenizer"),
    ("nllb-clip", other_width, "does not match its architecture"),
    ("nllb-siglip-mrl", one_head_short, "no MRL head of width"),
    ("nllb-siglip-mrl", remove("model.safetensors"), "holds the heads"),
    ("capivara", harmful, "would run code"),
    ("capivara", lambda f: edit_json(f / "open_clip_config.json", model_cfg={}), "any known family"),
    (
        "capivara-lora",
        lambda f: truncated(f / "adapter_model.safetensors"),
        "does not fit its base",
    ),
    ("altclip", remove("model.safetensors"), "holds no weights"),
    ("altclip", lambda f: truncated(f / "model.safetensors"), "cut short or corrupt"),
    ("altclip", lambda f: edit_json(f / "preprocessor_config.json", do_center_crop=False), "not CLIP's"),
    ("altclip", remove("tokenizer.json"), "no usable tokenizer"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named(
    name: str,
    damage: Callable[[Path], None],
    message: str,
    copy_of: CopyOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(name)
    if name == "capivara-lora":
        copy_of("capivara")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        towers_from_checkpoint(folder)
    assert "ran code" not in capsys.readouterr().out


def test_altclip_with_missing_tensors_is_refused(copy_of: CopyOf) -> None:
    folder = copy_of("altclip")
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_projection\.weight is missing"):
        towers_from_checkpoint(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nobody/no-such-model"])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at|neither a local folder nor"):
        towers_from_checkpoint(name)


def test_an_unknown_folder_lists_the_known_families(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"nllb-clip.*capivara.*altclip"):
        towers_from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "path", "value", "message"),
    [
        (
            "capivara", "open_clip_config.json", ("model_cfg", "text_cfg", "tokenizer_mode"), "clips",
            "tokenizer_mode 'clips'",
        ),
        ("nllb-clip", "tokenizer_config.json", ("legacy_behaviour",), True, "legacy_behaviour"),
    ],
)  # fmt: skip
def test_a_tokenizer_setting_that_would_be_overruled_is_refused(
    name: str,
    file: str,
    path: tuple[str, ...],
    value: object,
    message: str,
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / name
    shutil.copytree(checkpoints / name, folder)
    data = json.loads((folder / file).read_text(encoding="utf-8"))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / file).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        towers_from_checkpoint(folder)
