"""Architectures of the sample checkpoints: the families' own classes at a small size.

Both open_clip families and AltCLIP share one image tower; only SigLIP's differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn
from transformers import AltCLIPConfig, AltCLIPModel, M2M100Config, XLMRobertaConfig

DIM = 128  # of the joint space; the SigLIP tower's own width is its dim
IMAGE_SIDE = 64
CONTEXT_LENGTH = 77
HALF = (0.5, 0.5, 0.5)
TEXT_WIDTH = 64
TEXT_LAYERS = 2
TEXT_HEADS = 4
IMAGE_WIDTH = 192
IMAGE_LAYERS = 4
IMAGE_HEADS = 6
PATCH = 8
SIGLIP_DIM = IMAGE_WIDTH

CLIP_VISION = {
    "image_size": IMAGE_SIDE,
    "layers": IMAGE_LAYERS,
    "width": IMAGE_WIDTH,
    "head_width": IMAGE_WIDTH // IMAGE_HEADS,
    "patch_size": PATCH,
}
SIGLIP_TRUNK: dict[str, Any] = {
    "architecture": "vit_base_patch16_siglip_224",
    "model_args": {
        "img_size": IMAGE_SIDE,
        "patch_size": PATCH,
        "embed_dim": SIGLIP_DIM,
        "depth": IMAGE_LAYERS,
        "num_heads": IMAGE_HEADS,
    },
    "pretrained_cfg": {"input_size": [3, IMAGE_SIDE, IMAGE_SIDE], "num_classes": 0},
}
"""Configuration of a small timm SigLIP tower, as timm reads it from a ``local-dir:`` folder."""

CLIP_PREPROCESSING = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
SIGLIP_PREPROCESSING = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
NLLB_TEXT = {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear", "context_length": CONTEXT_LENGTH}
XLMR_TEXT = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": CONTEXT_LENGTH}


def open_clip_config(folder: Path, root: Path, *, siglip: bool = False, xlmr: bool = False) -> dict[str, Any]:
    """Return the contents of ``open_clip_config.json`` for a sample folder.

    Published folders name a hub repository as their text model; a sample folder names itself, relative to the
    repository's root, so that open_clip can build it from there.
    """
    name = folder.relative_to(root).as_posix()
    model = {
        "embed_dim": SIGLIP_DIM if siglip else DIM,
        "custom_text": True,
        "vision_cfg": siglip_vision(name) if siglip else CLIP_VISION,
        "text_cfg": {"hf_model_name": name, "hf_tokenizer_name": name, **(XLMR_TEXT if xlmr else NLLB_TEXT)},
    }
    if siglip:
        model["init_logit_bias"] = -10
    return {"model_cfg": model, "preprocess_cfg": SIGLIP_PREPROCESSING if siglip else CLIP_PREPROCESSING}


def siglip_vision(folder_name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a SigLIP tower whose timm configuration is in the folder."""
    return {
        "image_size": IMAGE_SIDE,
        "timm_model_name": f"local-dir:{folder_name}/timm",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def open_clip_model(folder: Path) -> CustomTextCLIP:
    """Build the open_clip model of a folder's configuration, with random weights."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    text = {**config.pop("text_cfg"), "hf_model_name": str(folder), "hf_model_pretrained": False}
    config.pop("custom_text")
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_name"] = f"local-dir:{folder / 'timm'}"
    return CustomTextCLIP(**config, text_cfg=text)


def nllb_config(vocab_size: int) -> M2M100Config:
    """Return NLLB's configuration; the decoder, which NLLB-CLIP discards, is as small as the encoder."""
    shape = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", TEXT_LAYERS),
            ("attention_heads", TEXT_HEADS),
            ("ffn_dim", 4 * TEXT_WIDTH),
            ("layerdrop", 0.0),
        )
    }
    return M2M100Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        scale_embedding=True,
        architectures=["M2M100Model"],
        **shape,
    )


def xlmr_shape(vocab_size: int) -> dict[str, Any]:
    """Return the sizes and special ids of an XLM-R encoder."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "intermediate_size": 4 * TEXT_WIDTH,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def xlmr_config(vocab_size: int) -> XLMRobertaConfig:
    """Return XLM-R's configuration."""
    return XLMRobertaConfig(architectures=["XLMRobertaModel"], **xlmr_shape(vocab_size))


def altclip_config(vocab_size: int) -> AltCLIPConfig:
    """Return AltCLIP's configuration with the same image tower as the open_clip samples."""
    vision = {
        "hidden_size": IMAGE_WIDTH,
        "intermediate_size": 4 * IMAGE_WIDTH,
        "num_hidden_layers": IMAGE_LAYERS,
        "num_attention_heads": IMAGE_HEADS,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH,
        "projection_dim": DIM,
        "hidden_act": "gelu",
    }
    text = {**xlmr_shape(vocab_size), "project_dim": DIM}
    return AltCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=DIM, architectures=["AltCLIPModel"]
    )


def load_altclip_image_tower(model: AltCLIPModel, tower: dict[str, Tensor]) -> None:
    """Copy an open_clip image tower's weights into AltCLIP's, splitting the fused query, key and value."""
    vision = {
        "embeddings.class_embedding": tower["class_embedding"],
        "embeddings.patch_embedding.weight": tower["conv1.weight"],
        "embeddings.position_embedding.weight": tower["positional_embedding"],
        **_renamed(tower, "ln_pre.", "pre_layrnorm."),
        **_renamed(tower, "ln_post.", "post_layernorm."),
    }
    for index in range(IMAGE_LAYERS):
        ours, theirs = f"transformer.resblocks.{index}.", f"encoder.layers.{index}."
        for name in ("weight", "bias"):
            parts = tower[f"{ours}attn.in_proj_{name}"].chunk(3)
            for projection, part in zip("qkv", parts, strict=True):
                vision[f"{theirs}self_attn.{projection}_proj.{name}"] = part
        vision |= _renamed(tower, f"{ours}attn.out_proj.", f"{theirs}self_attn.out_proj.")
        vision |= _renamed(tower, f"{ours}ln_1.", f"{theirs}layer_norm1.")
        vision |= _renamed(tower, f"{ours}ln_2.", f"{theirs}layer_norm2.")
        vision |= _renamed(tower, f"{ours}mlp.c_fc.", f"{theirs}mlp.fc1.")
        vision |= _renamed(tower, f"{ours}mlp.c_proj.", f"{theirs}mlp.fc2.")
    model.vision_model.load_state_dict(vision)
    model.visual_projection.weight.data.copy_(tower["proj"].T)


def _renamed(tower: dict[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    return {after + key.removeprefix(before): value for key, value in tower.items() if key.startswith(before)}


class MatryoshkaHeads(nn.Module):
    """MRL heads, one linear layer per width, shared by both towers; named as in published checkpoints."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(width): nn.Linear(dim, width) for width in widths})

    def forward(self, embedding: Tensor) -> dict[int, Tensor]:
        """Map (rows, dim) to (rows, width) by width; neither is normalised."""
        return {int(width): head(embedding) for width, head in self.layers.items()}


class AltClipText(nn.Module):
    """AltCLIP's text tower as one module, ids → (rows, dim)."""

    def __init__(self, model: AltCLIPModel) -> None:
        super().__init__()
        self.model, self.projection = model.text_model, model.text_projection
        self.pad_id = int(model.config.text_config.pad_token_id)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed int64 ids (rows, length) to (rows, dim)."""
        mask = (ids != self.pad_id).long()
        return torch.as_tensor(self.projection(self.model(input_ids=ids, attention_mask=mask).pooler_output))
