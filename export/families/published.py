"""Published facts that checkpoint files omit: text model configurations, languages, licences.

An open_clip folder gives only the hub name of its text model (``facebook/nllb-200-distilled-600M``), not
that model's configuration. The published configurations are here, so that a downloaded folder can be
exported offline. Licences are those of the weights, which manifests repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LICENCES", "TEXT_CONFIGS", "VARIANTS", "XLM_R_LANGUAGES"]


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
"""Transformers configurations by hub name."""

LICENCES: Mapping[str, str] = {
    "nllb-clip": "CC-BY-NC-4.0",
    "capivara": "MIT",
    "altclip": "creativeml-openrail-m",
    "m-clip": "MIT",
    "metaclip2": "CC-BY-NC-4.0",
    "siglip2": "Apache-2.0",
    "xlm-roberta-clip": "MIT",
}
"""Licence of the published weights, by family; a checkpoint's own README overrides it."""


XLM_R_LANGUAGES = tuple(
    """
    afr_Latn als_Latn amh_Ethi arb_Arab asm_Beng azj_Latn bel_Cyrl ben_Beng bos_Latn bre_Latn bul_Cyrl
    cat_Latn ces_Latn cym_Latn dan_Latn deu_Latn ell_Grek eng_Latn epo_Latn est_Latn eus_Latn fin_Latn
    fra_Latn fry_Latn gaz_Latn gla_Latn gle_Latn glg_Latn guj_Gujr hau_Latn heb_Hebr hin_Deva hrv_Latn
    hun_Latn hye_Armn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kan_Knda kat_Geor kaz_Cyrl khk_Cyrl
    khm_Khmr kir_Cyrl kmr_Latn kor_Hang lao_Laoo lit_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mya_Mymr
    nld_Latn nob_Latn npi_Deva ory_Orya pan_Guru pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn
    rus_Cyrl san_Deva sin_Sinh slk_Latn slv_Latn snd_Arab som_Latn spa_Latn srp_Cyrl sun_Latn swe_Latn
    swh_Latn tam_Taml tel_Telu tgl_Latn tha_Thai tur_Latn uig_Arab ukr_Cyrl urd_Arab uzn_Latn vie_Latn
    xho_Latn ydd_Hebr zho_Hans zho_Hant zsm_Latn
    """.split()  # noqa: SIM905 - one code a line would take a page
)
"""Training languages of XLM-R (CC-100, arXiv 1911.02116, table 6), as FLORES-200 codes, without Latin.

The CLIP models were aligned on fewer: CAPIVARA mainly on Portuguese, AltCLIP on 2, 9 or 18, M-CLIP on 48.
MetaCLIP 2's tokenizer, XLM-V's, was made from the same texts; the model was trained on some 300 languages.
"""

SIGLIP2_LANGUAGES = tuple(
    """
    arb_Arab ben_Beng ces_Latn dan_Latn deu_Latn ell_Grek eng_Latn fin_Latn fra_Latn heb_Hebr hin_Deva
    hrv_Latn hun_Latn ind_Latn ita_Latn jpn_Jpan kor_Hang mri_Latn nld_Latn nob_Latn pes_Arab pol_Latn
    por_Latn ron_Latn rus_Cyrl spa_Latn swe_Latn swh_Latn tel_Telu tgl_Latn tha_Thai tur_Latn ukr_Cyrl
    vie_Latn zho_Hans
    """.split()  # noqa: SIM905 - one code a line would take a page
)
"""Languages that SigLIP 2's paper evaluates (Crossmodal-3600, without Cusco Quechua, which FLORES-200 lacks).

It was trained on 109 languages, which are not listed.
"""


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


_LAYERS: Mapping[str, int] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""Layers of a base-size tower."""


def _metaclip2(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    dim = text["projection_dim"]
    ids = {"vocab_size": 901629, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return {
        "projection_dim": dim,
        "text_config": {**text, **ids, "max_position_embeddings": 77},
        "vision_config": {"image_size": 224, **vision, "projection_dim": dim},
    }


_SIGLIP2_BASE: Mapping[str, Any] = {
    "text_config": {
        **_LAYERS,
        "vocab_size": 256000,
        "max_position_embeddings": 64,
        "projection_size": 768,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "vision_config": {**_LAYERS, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
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
    "xlm-roberta-large-ViT-H-14": {"open_clip": "xlm-roberta-large-ViT-H-14"},
    "XLM-Roberta-Large-Vit-B-32": {"m_clip": "ViT-B-32-quickgelu"},
    "XLM-Roberta-Large-Vit-L-14": {"m_clip": "ViT-L-14-quickgelu"},
    "XLM-Roberta-Large-Vit-B-16Plus": {"m_clip": "ViT-B-16-plus-240"},
    "siglip2-base-patch16-224": {"siglip2": _SIGLIP2_BASE},
    "ViT-B-16-SigLIP2": {"open_clip": "ViT-B-16-SigLIP2"},
    "metaclip-2-worldwide-b32": {
        "metaclip2": _metaclip2(
            {
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 8,
                "hidden_act": "gelu",
                "projection_dim": 512,
            },
            {**_LAYERS, "patch_size": 32, "hidden_act": "gelu"},
        )
    },
    "metaclip-2-worldwide-huge-quickgelu": {
        "metaclip2": _metaclip2(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "hidden_act": "quick_gelu",
                "projection_dim": 1024,
            },
            {**_VIT_H, "patch_size": 14, "hidden_act": "quick_gelu"},
        )
    },
    "AltCLIP": {"altclip": _altclip(768, 768, _VIT_L)},
    "AltCLIP-m9": {"altclip": _altclip(768, 768, _VIT_L)},
    "AltCLIP-m18": {"altclip": _altclip(1024, 1024, _VIT_H)},
}
"""Published variants by name: an open_clip architecture (with MRL heads), a transformers configuration, or
for M-CLIP the open_clip architecture of its image tower."""
