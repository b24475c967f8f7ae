"""Tiny random-weight checkpoints of the families without a trained sample, with a sample's whole vocabulary.

File names, configuration fields and tensor names are those of the published folders, and the weights are
saved by the family's own library.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sample_models import CHECKPOINTS
from tiny_checkpoints import DIM, IMAGE, PREPROCESS, WIDTH, clip_processor, shaken, write_json, xlm_roberta

from bench.models.gemma_tokenizer import write_gemma_tokenizer

N_TOKENS = 28002
"""Vocabulary of the samples' XLM-R tokenizer."""

SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}

VISION = {"image_size": IMAGE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 16}


def tiny_nearby(family: str, folder: Path) -> dict[str, Any]:
    """Write a checkpoint, equal for equal names; give the arguments of ``towers_from_checkpoint``."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    return _WRITERS[family](folder)


def _xlm_roberta_large(folder: Path) -> dict[str, Any]:
    from export.families.open_clip_checkpoint import model_from_config

    text = {**xlm_roberta(), "vocab_size": N_TOKENS}
    model = {
        "embed_dim": DIM,
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": "xlm-roberta-large",
            "hf_tokenizer_name": "xlm-roberta-large",
            "hf_pooler_type": "mean_pooler",
        },
    }
    write_json(folder / "config.json", text)
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": PREPROCESS})
    torch.save(shaken(model_from_config(model, text)), folder / "open_clip_pytorch_model.bin")
    copy_tokenizer("capivara", folder)
    return {"checkpoint": folder}


def _m_clip(folder: Path) -> dict[str, Any]:
    """The text tower as the package saves it, and an open_clip folder of OpenAI's kind."""
    from multilingual_clip.Config_MCLIP import MCLIPConfig
    from multilingual_clip.pt_multilingual_clip import MultilingualCLIP
    from open_clip.model import CLIP
    from transformers import XLMRobertaConfig, XLMRobertaModel

    base = folder / "xlm-roberta-large"
    text = {**xlm_roberta(), "vocab_size": N_TOKENS}
    XLMRobertaModel(XLMRobertaConfig(**{k: v for k, v in text.items() if k != "model_type"})).save_pretrained(
        base
    )
    config = MCLIPConfig(modelBase=str(base), transformerDimSize=WIDTH, imageDimSize=DIM)
    state = shaken(MultilingualCLIP(config))
    state["transformer.embeddings.position_ids"] = torch.arange(130)[None]
    torch.save(state, folder / "pytorch_model.bin")
    published = {
        "transformerDimensions": WIDTH,
        "numDims": DIM,
        "modelBase": str(base),
        "model_type": "M-CLIP",
    }
    write_json(folder / "config.json", published)
    copy_tokenizer("capivara", folder)
    image = folder / "vit"
    image.mkdir()
    model = {
        "embed_dim": DIM,
        "quick_gelu": True,
        "vision_cfg": VISION,
        "text_cfg": {"context_length": 77, "vocab_size": 400, "width": WIDTH, "heads": 2, "layers": 1},
    }
    write_json(image / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": PREPROCESS})
    save_file(shaken(CLIP(**model)), image / "open_clip_model.safetensors")
    return {"checkpoint": folder, "image_tower": image}


def _siglip2(folder: Path) -> dict[str, Any]:
    """A transformers folder with the class that the published ones name, which keeps capitals."""
    from transformers import SiglipConfig, SiglipModel

    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**layers, "vocab_size": write_gemma_tokenizer(folder), "projection_size": WIDTH}
    image = {**layers, "image_size": IMAGE, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=image))
    model.load_state_dict(shaken(model))
    model.save_pretrained(folder)
    preprocessor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5] * 3,
        "processor_class": "SiglipProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE, "width": IMAGE},
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    return {"checkpoint": folder}


def _siglip2_open_clip(folder: Path) -> dict[str, Any]:
    from open_clip.model import CustomTextCLIP

    timm = {"img_size": IMAGE, "patch_size": 16, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    (folder / "timm").mkdir()
    write_json(
        folder / "timm" / "config.json",
        {
            "architecture": "vit_base_patch16_siglip_224",
            "model_args": timm,
            "pretrained_cfg": {"input_size": [3, IMAGE, IMAGE], "num_classes": 0},
        },
    )
    model: dict[str, Any] = {
        "embed_dim": WIDTH,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": IMAGE,
            "timm_model_name": f"local-dir:{folder / 'timm'}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": write_gemma_tokenizer(folder),
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": WIDTH,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-06},
            "act_kwargs": {"approximate": "tanh"},
        },
    }
    config = {"model_cfg": {**model, "custom_text": True}, "preprocess_cfg": SQUASH}
    write_json(folder / "open_clip_config.json", config)
    save_file(shaken(CustomTextCLIP(**model)), folder / "open_clip_model.safetensors")
    return {"checkpoint": folder}


def _metaclip2(folder: Path) -> dict[str, Any]:
    from transformers import MetaClip2Config, MetaClip2Model

    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text = {**layers, **ids, "vocab_size": N_TOKENS, "projection_dim": DIM}
    image = {**layers, "image_size": IMAGE, "patch_size": 16, "projection_dim": DIM}
    model = MetaClip2Model(MetaClip2Config(text_config=text, vision_config=image, projection_dim=DIM))
    model.load_state_dict(shaken(model))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", clip_processor())
    copy_tokenizer("capivara", folder)
    return {"checkpoint": folder}


_WRITERS = {
    "xlm-roberta-clip": _xlm_roberta_large,
    "m-clip": _m_clip,
    "siglip2": _siglip2,
    "siglip2-open-clip": _siglip2_open_clip,
    "metaclip2": _metaclip2,
}

NEARBY = tuple(_WRITERS)
"""Forms of the families without a trained sample."""


def copy_tokenizer(sample: str, folder: Path) -> None:
    """Copy a sample's tokenizer files."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / sample / name, folder / name)
