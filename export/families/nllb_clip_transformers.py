"""NLLB-CLIP in its author's first form: a transformers folder of type ``clip`` with an M2M100 text model.

The folder's own code (``modeling_nllb_clip.py``) is never run. The model is built here from transformers'
modules, under the published names: M2M100's encoder, one more layer norm over position 0, a projection
without bias; CLIP's image tower. If the folder has no tokenizer or preprocessing, those of the author's
examples are used: NLLB-200's tokenizer and the preprocessing of ``openai/clip-vit-base-patch32``.

Source: ``NLLBCLIPModel`` and ``NLLBCLIPConfig`` of github.com/visheratin/nllb-clip.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.clip_processors import (
    PROCESSOR_FILES,
    image_preprocessing_of,
    image_processor_of,
    tokenizer_of,
)
from export.families.encoders import m2m_encoder_from_transformers
from export.families.family import LoadOptions, file_of, folder_of
from export.families.image_encoders import ClipVisionEncoder
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.references import NllbClipReference
from export.families.tokenizers import preprocessing_from_tokenizer, tokenizer_json
from export.fingerprint.fingerprints import with_fingerprint
from export.towers import ImageTowerModule, MrlHeads, TextTowerModule, Towers
from export.weights.adapter_merge import Probe, merge_adapter, random_inputs
from export.weights.tensors import (
    chosen_weights,
    config_from_file,
    in_one_line,
    load_strictly,
    state_dict_from_file,
    without_still_buffers,
    without_wrappers,
)
from runtime.errors import CheckpointError

__all__ = ["claims", "load"]

CONTEXT_LENGTH = 77
_PUBLISHED_TOKENIZER = "facebook/nllb-200-distilled-600M"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "activation_function": "relu",
    "d_model": 1024,
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
}
"""Defaults of the author's ``NLLBCLIPTextConfig``; a config.json may omit values equal to them."""


class NllbClip(nn.Module):
    """NLLB-CLIP model with the published parameter names, built from transformers' modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        text, vision = {**_TEXT_DEFAULTS, **config["text_config"]}, config["vision_config"]
        self.text_model = nn.Module()
        self.text_model.encoder = _m2m_encoder(text)
        self.text_model.final_layer_norm = nn.LayerNorm(text["d_model"], eps=text["layer_norm_eps"])
        self.vision_model = _vision_model(vision)
        dim = config.get("projection_dim", 512)
        self.text_projection = nn.Linear(text["d_model"], dim, bias=False)
        self.visual_projection = nn.Linear(self.vision_model.config.hidden_size, dim, bias=False)
        self.pad_id, self.n_tokens, self.dim = int(text["pad_token_id"]), int(text["vocab_size"]), int(dim)

    def text_features(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed ids and mask, both int64 (batch, tokens), to (batch, dim), not normalised."""
        encoder: Any = self.text_model.encoder
        hidden = encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        norm = cast("nn.Module", self.text_model.final_layer_norm)
        return cast("Tensor", self.text_projection(norm(hidden)[:, 0]))

    def image_features(self, pixels: Tensor) -> Tensor:
        """Embed pixels, float32 (batch, 3, height, width), to (batch, dim), not normalised."""
        return cast("Tensor", self.visual_projection(self.vision_model(pixels).pooler_output))


class NormedPool(nn.Module):
    """Pooling by position 0, layer norm and projection: (batch, tokens, width) → (batch, dim)."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool position 0; selected first, as the layer norm acts on each token separately."""
        return cast("Tensor", self.projection(self.norm(hidden[:, 0])))


def claims(folder: Path) -> bool:
    """Check for a configuration of model type ``clip`` whose text model has M2M100's sizes."""
    path = folder / "config.json"
    config = config_from_file(path) if path.is_file() else {}
    text = config.get("text_config") or config.get("text_config_dict")
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and "NLLBCLIPModel" in architectures
    return (
        config.get("model_type") == "clip" and isinstance(text, dict) and (named or "encoder_ffn_dim" in text)
    )


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not match the architecture exactly,
            or the tokenizer lacks NLLB's languages.
    """
    folder = folder_of(path)
    weights = file_of(path) or chosen_weights(folder, _WEIGHT_FILES)
    model = _model(folder, weights)
    licence, source = licence_of_folder(folder, "nllb-clip"), {"weights": weights.name}
    reference_model = model
    if options.adapter is not None:
        reference_model = cast("NllbClip", merge_adapter(model, options.adapter, _probe(model)))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    tokenizer = tokenizer_of(folder, "NllbTokenizer", published=_PUBLISHED_TOKENIZER, legacy_behaviour=False)
    processor = _image_processor(folder, model)
    encoder = m2m_encoder_from_transformers(model.text_model.encoder)
    context_length = options.context_length or CONTEXT_LENGTH
    text = preprocessing_from_tokenizer(
        tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=encoder.pad_id,
        context_length=context_length,
        clean="none",
    )
    if not text.needs_language:
        raise CheckpointError(
            f"The tokenizer in {folder} has no language tokens, which NLLB needs. "
            "Copy the files of facebook/nllb-200-distilled-600M's tokenizer beside the weights."
        )
    image = image_preprocessing_of(processor, folder)
    serialised, heads = tokenizer_json(tokenizer), MrlHeads({})
    text_tower = TextTowerModule(
        encoder,
        NormedPool(cast("nn.Module", model.text_model.final_layer_norm), model.text_projection),
        heads,
    ).eval()
    image_tower = ImageTowerModule(
        ClipVisionEncoder(model.vision_model, model.visual_projection), heads, mean=image.mean, std=image.std
    ).eval()
    reference = NllbClipReference(
        tokenizer=tokenizer, image_processor=processor, model=reference_model, context_length=context_length
    )
    towers = Towers(
        family="nllb-clip",
        architecture=_architecture(model),
        licence=licence,
        dim=model.dim,
        text=text_tower,
        image=image_tower,
        tokenizer_json=serialised,
        text_preprocessing=text,
        image_preprocessing=image,
        languages=tuple(text.language_ids),
        reference=reference,
        source=source,
    )
    return with_fingerprint(towers, unmerged=None if options.adapter is None else [reference_model])


def _model(folder: Path, weights: Path) -> NllbClip:
    config = config_from_file(folder / "config.json")
    parts = {
        part: {**(config.get(part) or {}), **(config.get(f"{part}_dict") or {})}
        for part in ("text_config", "vision_config")
    }
    try:
        model = NllbClip({**config, **parts})
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe an NLLB-CLIP model that can be built: "
            f"{type(error).__name__}: {in_one_line(error)}. Copy it again."
        ) from error
    state = without_wrappers(state_dict_from_file(weights), "vision_model.", origin=weights)
    state = without_still_buffers(state, model, origin=weights)
    state.pop("logit_scale", None)  # scales scores, moves no vector
    load_strictly(model, state, origin=weights)
    return model.eval().requires_grad_(False)


def _m2m_encoder(config: Mapping[str, Any]) -> Any:
    from transformers import AutoModel, M2M100Config

    known = {k: v for k, v in config.items() if k in _TEXT_DEFAULTS and k != "layer_norm_eps"}
    small = {"decoder_layers": 1, "decoder_ffn_dim": 1, "decoder_attention_heads": 1}  # built, and dropped
    return AutoModel.from_config(M2M100Config(**known, **small), attn_implementation="eager").encoder


def _vision_model(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    dropped = ("model_type", "transformers_version", "torch_dtype", "dtype", "architectures")
    known = {k: v for k, v in config.items() if k not in dropped}
    settings = CLIPVisionConfig(**known)
    settings._attn_implementation = "eager"
    return CLIPVisionModel(settings)


def _image_processor(folder: Path, model: NllbClip) -> Any:
    """Load the folder's image processor; by default CLIP's, as on the author's page, at the tower's size."""
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        return image_processor_of(folder)
    side = int(model.vision_model.config.image_size)
    published = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    with tempfile.TemporaryDirectory() as stage:
        (Path(stage) / PROCESSOR_FILES[0]).write_text(json.dumps(published), encoding="utf-8")
        return image_processor_of(Path(stage))


def _probe(model: NllbClip) -> Probe:
    ids, pixels = random_inputs(
        n_tokens=model.n_tokens, pad_id=model.pad_id, image_size=model.vision_model.config.image_size
    )

    @torch.inference_mode()
    def vectors(candidate: nn.Module) -> dict[str, Tensor]:
        found: Any = candidate
        return {
            "text": found.text_features(ids, (ids != model.pad_id).long()),
            "image": found.image_features(pixels),
        }

    return vectors


def _architecture(model: NllbClip) -> str:
    text: Any = model.text_model.encoder
    vision = model.vision_model.config
    return (
        f"m2m_100 {text.config.d_model}x{text.config.encoder_layers} + "
        f"ViT {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}"
    )
