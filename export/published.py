"""The published checkpoints: what their files leave unsaid.

An open_clip folder names its text model by hub name (``facebook/nllb-200-distilled-600M``) and keeps that
model's configuration elsewhere. These are the published ones, so that a downloaded folder exports with no
network. Licences are those of the weights, which manifests repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LICENCES", "TEXT_CONFIGS", "VARIANTS"]


def _m2m(layers: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "m2m_100",
        "vocab_size": 256206,
        "d_model": 1024,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": ffn,
        "decoder_ffn_dim": ffn,
        "max_position_embeddings": 1024,
        "activation_function": "relu",
        "scale_embedding": True,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def _xlm_roberta(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-05,
        "hidden_act": "gelu",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


TEXT_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "facebook/nllb-200-distilled-600M": _m2m(12, 4096),
    "facebook/nllb-200-distilled-1.3B": _m2m(24, 8192),
    "xlm-roberta-base": _xlm_roberta(768, 12),
    "FacebookAI/xlm-roberta-base": _xlm_roberta(768, 12),
    "xlm-roberta-large": _xlm_roberta(1024, 24),
    "FacebookAI/xlm-roberta-large": _xlm_roberta(1024, 24),
}
"""transformers configurations by hub name."""

LICENCES: Mapping[str, str] = {
    "nllb-clip": "CC-BY-NC-4.0",
    "capivara": "MIT",
    "altclip": "creativeml-openrail-m",
}
"""Licence of the published weights, by family; a checkpoint's own README overrides it."""


def _altclip(project_dim: int, projection_dim: int, vision: Mapping[str, Any]) -> dict[str, Any]:
    text = {**_xlm_roberta(1024, 24), "model_type": "altclip_text_model", "project_dim": project_dim}
    return {
        "model_type": "altclip",
        "projection_dim": projection_dim,
        "text_config": text,
        "vision_config": {
            "model_type": "altclip_vision_model",
            "image_size": 224,
            "patch_size": 14,
            **vision,
        },
    }


_VIT_L: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_VIT_H: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "nllb-clip-base": {"open_clip": "nllb-clip-base"},
    "nllb-clip-large": {"open_clip": "nllb-clip-large"},
    "nllb-clip-base-siglip": {"open_clip": "nllb-clip-base-siglip"},
    "nllb-clip-large-siglip": {"open_clip": "nllb-clip-large-siglip"},
    "nllb-siglip-mrl-base": {"open_clip": "nllb-clip-base-siglip", "mrl_dims": (32, 64, 128, 256, 512)},
    "nllb-siglip-mrl-large": {"open_clip": "nllb-clip-large-siglip", "mrl_dims": (32, 64, 128, 256, 512)},
    "xlm-roberta-base-ViT-B-32": {"open_clip": "xlm-roberta-base-ViT-B-32"},
    "AltCLIP": {"altclip": _altclip(768, 768, _VIT_L)},
    "AltCLIP-m9": {"altclip": _altclip(768, 768, _VIT_L)},
    "AltCLIP-m18": {"altclip": _altclip(1024, 1024, _VIT_H)},
}
"""Published variants by name: an open_clip architecture (with MRL heads), or an AltCLIP configuration."""
