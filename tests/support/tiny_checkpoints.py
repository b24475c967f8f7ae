"""Checkpoint folders of every family with random weights and a few hundred tokens: read in milliseconds."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, DIM, IMAGE = 16, 8, 32
LANGUAGES = ("eng_Latn", "fra_Latn", "por_Latn", "zho_Hans")
MRL_WIDTHS = (2, 4)
FAMILIES = ("nllb-clip", "nllb-siglip-mrl", "capivara", "altclip", "nllb-clip-transformers")

_PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    *string.ascii_letters,
    *string.digits,
    *"áéíóúãõçèêüñ中文字。",
]
_N_PIECES = len(_PIECES)
N_TOKENS = 320
PREPROCESS = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def tiny_checkpoint(family: str, folder: Path) -> Path:
    """Write a checkpoint folder of a family; equal for equal arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    {
        "nllb-clip": lambda: _open_clip(folder, nllb=True),
        "nllb-siglip-mrl": lambda: _mrl(folder),
        "capivara": lambda: _open_clip(folder, nllb=False),
        "altclip": lambda: _altclip(folder),
        "nllb-clip-transformers": lambda: _nllb_transformers(folder),
    }[family]()
    return folder


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _m2m() -> dict[str, Any]:
    return {
        "model_type": "m2m_100",
        "architectures": ["M2M100Model"],
        "is_encoder_decoder": True,
        "vocab_size": N_TOKENS,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 128,
        "activation_function": "relu",
        "scale_embedding": True,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def xlm_roberta() -> dict[str, Any]:
    """A text model's ``config.json``."""
    return {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
        "vocab_size": N_TOKENS,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 130,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-05,
        "hidden_act": "gelu",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def vision() -> dict[str, Any]:
    """An image model's part of a ``config.json``."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": 16,
        "hidden_act": "gelu",
    }


def _open_clip(folder: Path, *, nllb: bool, timm: bool = False, dim: int = DIM) -> None:
    from export.families.open_clip_checkpoint import model_from_config

    text = _m2m() if nllb else xlm_roberta()
    write_json(folder / "config.json", text)
    model: dict[str, Any] = {
        "embed_dim": dim,
        "custom_text": True,
        "vision_cfg": {"image_size": IMAGE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 16},
        "text_cfg": {
            "hf_model_name": "tiny/text",
            "hf_tokenizer_name": "tiny/text",
            "hf_pooler_type": "cls_pooler" if nllb else "mean_pooler",
            "hf_proj_type": "linear" if nllb else "mlp",
            "context_length": 77,
        },
    }
    if timm:
        model["vision_cfg"] = {
            "image_size": IMAGE,
            "timm_model_name": "local-dir:timm",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        model["init_logit_bias"] = -10
        (folder / "timm").mkdir(exist_ok=True)
        write_json(
            folder / "timm" / "config.json",
            {
                "architecture": "vit_base_patch16_siglip_224",
                "model_args": {
                    "img_size": IMAGE,
                    "patch_size": 16,
                    "embed_dim": dim,
                    "depth": 2,
                    "num_heads": 2,
                },
                "pretrained_cfg": {"input_size": [3, IMAGE, IMAGE], "num_classes": 0},
            },
        )
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": PREPROCESS})
    built = dict(model)
    if timm:
        built["vision_cfg"] = {**model["vision_cfg"], "timm_model_name": f"local-dir:{folder / 'timm'}"}
    save_file(shaken(model_from_config(built, text)), folder / "open_clip_model.safetensors")
    _tokenizer(folder, nllb=nllb)


def _mrl(folder: Path) -> None:
    _open_clip(folder, nllb=True, timm=True, dim=WIDTH)
    heads = {}
    for width in MRL_WIDTHS:
        heads[f"matryoshka_layer.layers.{width}.weight"] = torch.randn(width, WIDTH)
        heads[f"matryoshka_layer.layers.{width}.bias"] = torch.randn(width)
    save_file(heads, folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            **_m2m(),
            "clip_model_name": "tiny-mrl",
            "mrl_resolutions": list(MRL_WIDTHS),
            "preprocess_cfg": {**PREPROCESS, "resize_mode": "squash"},
        },
    )


def _altclip(folder: Path) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel

    text = {**xlm_roberta(), "model_type": "altclip_text_model", "project_dim": DIM}
    image = {**vision(), "model_type": "altclip_vision_model", "projection_dim": DIM}
    config = AltCLIPConfig(text_config=text, vision_config=image, projection_dim=DIM)
    model = AltCLIPModel(config)
    model.load_state_dict(shaken(model))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", clip_processor())
    _tokenizer(folder, nllb=False)


def clip_processor() -> dict[str, Any]:
    """A CLIP image processor's ``preprocessor_config.json``."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "size": {"shortest_edge": IMAGE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": PREPROCESS["mean"],
        "image_std": PREPROCESS["std"],
    }


def _nllb_transformers(folder: Path) -> None:
    from export.families.nllb_clip_transformers import NllbClip

    config = {
        "model_type": "clip",
        "architectures": ["NLLBCLIPModel"],
        "auto_map": {"AutoModel": "modeling_nllb_clip.NLLBCLIPModel"},
        "projection_dim": DIM,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            **{k: v for k, v in _m2m().items() if not k.startswith(("decoder", "is_", "arch"))},
            "model_type": "clip_text_model",
            "layer_norm_eps": 1e-05,
        },
        "vision_config": {**vision(), "model_type": "clip_vision_model", "projection_dim": DIM},
    }
    write_json(folder / "config.json", config)
    state = shaken(NllbClip(config))
    save_file({**state, "logit_scale": torch.tensor(2.66)}, folder / "model.safetensors")
    _tokenizer(folder, nllb=True)


def shaken(model: nn.Module) -> dict[str, Tensor]:
    """Weights far enough from zero that every one of them moves a vector."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (tensor + 0.2 * torch.randn(tensor.shape, generator=generator)).contiguous()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }


def _tokenizer(folder: Path, *, nllb: bool) -> None:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    languages = sorted(FAIRSEQ_LANGUAGE_CODES) if nllb else []
    added = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [{"id": i, "content": token} for i, token in enumerate(added)]
    for i, token in enumerate(["<mask>", *languages], start=_N_PIECES):
        tokens.append({"id": i, "content": token})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = languages[0] if nllb else "<s>"
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{**token, **flags} for token in tokens],
            "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            "pre_tokenizer": {
                "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
            },
            "post_processor": _template(first, next(t["id"] for t in tokens if t["content"] == first)),
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "model": _pieces(bpe=nllb),
        },
    )  # fmt: skip
    config = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": 128,
        "tokenizer_class": "NllbTokenizer" if nllb else "XLMRobertaTokenizer",
    }
    if nllb:
        config |= {"extra_special_tokens": languages, "legacy_behaviour": False, "src_lang": languages[0]}
    write_json(folder / "tokenizer_config.json", config)


def _pieces(*, bpe: bool) -> dict[str, Any]:
    if not bpe:
        return {"type": "Unigram", "unk_id": 3, "vocab": [[p, -5.0] for p in _PIECES], "byte_fallback": False}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": False,
        "vocab": {piece: i for i, piece in enumerate(_PIECES)},
        "merges": [],
    }


def _template(first: str, first_id: int) -> dict[str, Any]:
    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [special(first), {"Sequence": {"id": "A", "type_id": 0}}, special("</s>")],
        "pair": [
            special(first),
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            special("</s>"),
        ],
        "special_tokens": {
            first: {"id": first, "ids": [first_id], "tokens": [first]},
            "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
        },
    }


def languages_of(family: str, n: int) -> Sequence[str | None]:
    """Languages for n texts, ``None`` where the family takes none."""
    return [LANGUAGES[i % len(LANGUAGES)] if family.startswith("nllb") else None for i in range(n)]
