"""AltCLIP (arXiv 2211.06679), m9 and m18 included: transformers folders, XLM-R large, CLIP image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.clip_processors import image_preprocessing_of, image_processor_of, tokenizer_of
from export.families.encoders import roberta_encoder_from_transformers
from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.image_encoders import ClipVisionEncoder
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.published import LICENCES, XLM_R_LANGUAGES
from export.families.references import AltClipReference
from export.families.tokenizers import preprocessing_from_tokenizer, tokenizer_json
from export.families.transformers_models import WEIGHT_FILES, model_from_folder
from export.fingerprint.fingerprints import with_fingerprint
from export.towers import ImageTowerModule, MrlHeads, TextTowerModule, Towers
from export.weights.adapter_merge import Probe, merge_adapter, random_inputs
from export.weights.tensors import chosen_weights, config_from_file

__all__ = ["FAMILY"]

CONTEXT_LENGTH = 77
"""Context length of the authors' code; the tokenizer alone allows 512."""

_UNUSED = "text_model.roberta.pooler."
"""Prefix of XLM-R's own pooler: stored in AltCLIP's files but not used by its embeddings."""


class AltPool(nn.Module):
    """AltCLIP's pooling, pre_LN → transformation → token 0 → text_projection.

    Maps (batch, tokens, width) to (batch, dim).
    """

    def __init__(self, text_model: Any, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.transformation = text_model.pre_LN, text_model.transformation
        self.projection = projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool token 0; selected first, as the layers before the projection act on each token separately."""
        return cast("Tensor", self.projection(self.transformation(self.norm(hidden[:, 0]))))


_PARTS = ("text_model", "text_projection", "vision_model", "visual_projection")
"""Modules of ``AltCLIPModel`` that compute the embeddings."""


def claims(path: Path) -> bool:
    """Check for a transformers folder of model type ``altclip``."""
    config = folder_of(path) / "config.json"
    return config.is_file() and config_from_file(config).get("model_type") == "altclip"


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not match the architecture exactly,
            the preprocessing is not that of CLIP's image processor, or ``merge_adapter`` rejects the adapter.
    """
    folder = folder_of(path)
    weights = file_of(path) or chosen_weights(folder, WEIGHT_FILES)
    model = model_from_folder(
        folder, weights, config_kind="AltCLIPConfig", model_kind="AltCLIPModel", unused=(_UNUSED,)
    )
    licence, source, reference_model = licence_of_folder(folder, "altclip"), {"weights": weights.name}, model
    if options.adapter is not None:
        reference_model = merge_adapter(model, options.adapter, _probe(model))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    tokenizer = tokenizer_of(folder, "XLMRobertaTokenizer")
    image_processor = image_processor_of(folder)
    context_length = options.context_length or CONTEXT_LENGTH
    encoder = roberta_encoder_from_transformers(model.text_model.roberta)
    text_preprocessing = preprocessing_from_tokenizer(
        tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=encoder.pad_id,
        context_length=context_length,
        clean="none",
    )
    image_preprocessing = image_preprocessing_of(image_processor, folder)
    serialised = tokenizer_json(tokenizer)
    heads = MrlHeads({})
    text_tower = TextTowerModule(encoder, AltPool(model.text_model, model.text_projection), heads).eval()
    image_tower = ImageTowerModule(
        ClipVisionEncoder(model.vision_model, model.visual_projection),
        heads,
        mean=image_preprocessing.mean,
        std=image_preprocessing.std,
    ).eval()
    reference = AltClipReference(
        tokenizer=tokenizer,
        image_processor=image_processor,
        model=reference_model,
        context_length=context_length,
    )
    parts = [getattr(reference_model, name) for name in _PARTS]
    towers = Towers(
        family="altclip",
        architecture=_architecture(model.config),
        licence=licence,
        dim=int(model.config.projection_dim),
        text=text_tower,
        image=image_tower,
        tokenizer_json=serialised,
        text_preprocessing=text_preprocessing,
        image_preprocessing=image_preprocessing,
        languages=XLM_R_LANGUAGES,
        reference=reference,
        source=source,
    )
    return with_fingerprint(towers, unmerged=None if options.adapter is None else parts)


def _probe(model: Any) -> Probe:
    pad_id = int(model.config.text_config.pad_token_id)
    ids, pixels = random_inputs(
        n_tokens=int(model.config.text_config.vocab_size),
        pad_id=pad_id,
        image_size=model.config.vision_config.image_size,
    )

    @torch.inference_mode()
    def vectors(candidate: nn.Module) -> dict[str, Tensor]:
        found: Any = candidate
        texts = found.get_text_features(ids, attention_mask=(ids != pad_id).long())
        return {"text": texts.pooler_output, "image": found.get_image_features(pixels).pooler_output}

    return vectors


def _architecture(config: Any) -> str:
    text, vision = config.text_config, config.vision_config
    return (
        f"XLM-R {text.hidden_size}x{text.num_hidden_layers} + "
        f"ViT {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}"
    )


FAMILY = Family(
    name="altclip",
    claims=claims,
    load=load,
    licence=LICENCES["altclip"],
    forms="transformers AltCLIPModel folder (AltCLIP, m9, m18)",
)
