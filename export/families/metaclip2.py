"""MetaCLIP 2 worldwide (arXiv 2507.22062): transformers folders with XLM-V's tokenizer of 901,629 tokens.

The text tower is causal and pools the first end-of-text token, so that padding needs no mask.
Published as ``facebook/metaclip-2-worldwide-huge-quickgelu`` and other sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.clip_processors import (
    image_preprocessing_of,
    image_processor_of,
    squashing_of,
    tokenizer_of,
)
from export.families.encoders import clip_encoder_from_transformers
from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.image_encoders import ClipVisionEncoder
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.published import LICENCES, XLM_R_LANGUAGES
from export.families.references import UnmaskedReference
from export.families.tokenizers import preprocessing_from_tokenizer, tokenizer_json
from export.families.transformers_models import WEIGHT_FILES, model_from_folder
from export.fingerprint.fingerprints import with_fingerprint
from export.towers import ImageTowerModule, MrlHeads, TextTowerModule, Towers
from export.weights.adapter_merge import Probe, merge_adapter, random_inputs
from export.weights.tensors import chosen_weights, config_from_file
from runtime.errors import CheckpointError
from runtime.manifest import TextPreprocessing

__all__ = ["FAMILY"]

_NAME = "metaclip2"


class EndPool(nn.Module):
    """MetaCLIP 2's pooling, a text's end → norm → projection: (batch, tokens, width) → (batch, dim)."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, hidden: Tensor, end: Tensor) -> Tensor:
        """Pool the token whose entry in ``end`` (batch, tokens) is 1; selected first, as in other pools."""
        pooled = (hidden * end.to(hidden.dtype).unsqueeze(-1)).sum(dim=1)
        return cast("Tensor", self.projection(self.norm(pooled)))


def claims(path: Path) -> bool:
    """Check for a transformers folder of model type ``metaclip_2``."""
    config = folder_of(path) / "config.json"
    return config.is_file() and config_from_file(config).get("model_type") == "metaclip_2"


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not match the architecture exactly,
            texts do not end with the token that the model pools, or ``merge_adapter`` rejects the adapter.
    """
    folder = folder_of(path)
    weights = file_of(path) or chosen_weights(folder, WEIGHT_FILES)
    tokenizer = tokenizer_of(folder, "XLMRobertaTokenizer")
    processor = image_processor_of(folder)
    model = model_from_folder(folder, weights, config_kind="MetaClip2Config", model_kind="MetaClip2Model")
    encoder = clip_encoder_from_transformers(model.text_model, causal=True)
    context_length = options.context_length or encoder.max_tokens
    end_id = int(model.config.text_config.eos_token_id)
    text = preprocessing_from_tokenizer(
        tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=None,
        context_length=context_length,
        clean="none",
        padding="unread",
    )
    if text.suffix_ids[-1:] != (end_id,):
        raise CheckpointError(
            f"The tokenizer of {folder} ends texts with {list(text.suffix_ids)}, but the model pools token "
            f"{end_id} (eos_token_id). The tokenizer files or the config.json belong to another checkpoint."
        )
    squash = getattr(processor.size, "shortest_edge", None) is None  # as the 378-pixel checkpoints do
    images = (squashing_of if squash else image_preprocessing_of)(processor, folder)
    reference_model, source, licence = model, {"weights": weights.name}, licence_of_folder(folder, _NAME)
    if options.adapter is not None:
        reference_model = merge_adapter(model, options.adapter, _probe(model, text, images.height))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    heads = MrlHeads({})
    pool = EndPool(model.text_model.final_layer_norm, model.text_projection)
    towers = Towers(
        family=_NAME,
        architecture=_architecture(model.config),
        licence=licence,
        dim=int(model.config.projection_dim),
        text=TextTowerModule(encoder, pool, heads, end_id=end_id).eval(),
        image=ImageTowerModule(
            ClipVisionEncoder(model.vision_model, model.visual_projection),
            heads,
            mean=images.mean,
            std=images.std,
        ).eval(),
        tokenizer_json=tokenizer_json(tokenizer),
        text_preprocessing=text,
        image_preprocessing=images,
        languages=XLM_R_LANGUAGES,
        reference=UnmaskedReference(
            tokenizer=tokenizer,
            image_processor=processor,
            model=reference_model,
            context_length=context_length,
        ),
        source=source,
    )
    parts = [getattr(reference_model, name) for name in _PARTS]
    return with_fingerprint(towers, unmerged=None if options.adapter is None else parts)


_PARTS = ("text_model", "text_projection", "vision_model", "visual_projection")
"""Modules of ``MetaClip2Model`` that compute the embeddings."""


def _probe(model: Any, text: TextPreprocessing, image_size: int) -> Probe:
    n_tokens = int(model.config.text_config.vocab_size)
    ids, pixels = random_inputs(n_tokens=n_tokens, pad_id=text.pad_id, image_size=image_size)
    ids[:2, -1], ids[2:, 6] = text.suffix_ids[-1], text.suffix_ids[-1]

    @torch.inference_mode()
    def vectors(candidate: nn.Module) -> dict[str, Tensor]:
        found: Any = candidate
        texts = found.get_text_features(ids).pooler_output
        return {"text": texts, "image": found.get_image_features(pixels).pooler_output}

    return vectors


def _architecture(config: Any) -> str:
    text, vision = config.text_config, config.vision_config
    return (
        f"MetaCLIP 2 {text.hidden_size}x{text.num_hidden_layers} + "
        f"ViT {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}"
    )


FAMILY = Family(
    name=_NAME,
    claims=claims,
    load=load,
    licence=LICENCES[_NAME],
    forms="transformers MetaClip2Model folder (worldwide)",
)
