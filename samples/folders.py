"""Write checkpoint folders in the families' published formats, with float16 weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AltCLIPModel, AltCLIPProcessor, CLIPImageProcessor, PreTrainedTokenizerBase

from samples.towers import (
    CLIP_PREPROCESSING,
    IMAGE_SIDE,
    SIGLIP_DIM,
    SIGLIP_PREPROCESSING,
    SIGLIP_TRUNK,
    MatryoshkaHeads,
)

WIDTHS = (32, 64, 128)  # all below the SigLIP sample's own 192, as the published ones are below 768
WEIGHTS = "open_clip_model.safetensors"


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file atomically, by renaming."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write float16 safetensors atomically, by renaming."""
    half = {name: tensor.detach().half().contiguous().clone() for name, tensor in tensors.items()}
    part = path.with_name(path.name + ".part")
    save_file(half, part, metadata={"format": "pt"})
    part.replace(path)


def write_open_clip_skeleton(
    folder: Path, tokenizer_folder: Path, text_config: Any, config: Mapping[str, Any]
) -> None:
    """Write everything except the weights: tokenizer, text configuration, open_clip's configuration."""
    copy_tokenizer(tokenizer_folder, folder)
    if "timm_model_name" in config["model_cfg"]["vision_cfg"]:
        (folder / "timm").mkdir(exist_ok=True)
        write_json(SIGLIP_TRUNK, folder / "timm" / "config.json")
    write_json(text_config.to_diff_dict(), folder / "config.json")
    write_json(config, folder / "open_clip_config.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer without its SentencePiece model, which ``tokenizer.json`` makes redundant."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.bpe.model").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def write_open_clip_weights(model: CustomTextCLIP, folder: Path) -> None:
    """Write an open_clip model's weights."""
    write_tensors(model.state_dict(), folder / WEIGHTS)


def write_matryoshka(heads: MatryoshkaHeads, folder: Path) -> None:
    """Write the MRL heads and their configuration keys, as in the published folders.

    A published folder repeats all weights in ``model.safetensors``; that would double the folder's size here.
    """
    path = folder / "config.json"
    described = {
        "clip_model_name": folder.name,
        "mrl_resolutions": list(WIDTHS),
        "target_resolution": SIGLIP_DIM,
        "preprocess_cfg": SIGLIP_PREPROCESSING,
    }
    write_json({**json.loads(path.read_text()), **described}, path)
    write_tensors(
        {f"matryoshka_layer.{k}": v for k, v in heads.state_dict().items()}, folder / "model.safetensors"
    )


def write_altclip(
    model: AltCLIPModel, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, folder: Path
) -> None:
    """Write a transformers folder with float16 weights that load as float32."""
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    model.to(torch.float16).save_pretrained(scratch)
    model.to(torch.float32)
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=list(CLIP_PREPROCESSING["mean"]),
        image_std=list(CLIP_PREPROCESSING["std"]),
    )
    AltCLIPProcessor(processor, tokenizer).save_pretrained(scratch)
    processor.save_pretrained(scratch)
    (scratch / "processor_config.json").unlink(
        missing_ok=True
    )  # published folders have preprocessor_config.json
    copy_tokenizer(tokenizer_folder, scratch)
    config = json.loads((scratch / "config.json").read_text())
    write_json(_as_float32(config), scratch / "config.json")
    replace_folder(scratch, folder)


def write_adapter(model: PeftModel, base: str, folder: Path) -> None:
    """Write a LoRA adapter as peft does, with a relative path to its base."""
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    (scratch / "README.md").unlink(missing_ok=True)
    path = scratch / "adapter_config.json"
    write_json({**json.loads(path.read_text()), "base_model_name_or_path": base}, path)
    replace_folder(scratch, folder)


def replace_folder(scratch: Path, folder: Path) -> None:
    """Move a folder's files into another folder, replacing existing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(scratch.iterdir()):
        path.replace(folder / path.name)
    scratch.rmdir()


def _as_float32(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: "float32" if key == "dtype" else _as_float32(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
