"""M-CLIP (Multilingual-CLIP, LREC 2022): XLM-R large, mean pooling, one linear layer; a CLIP image tower.

A published folder (``M-CLIP/XLM-Roberta-Large-Vit-B-32``, ``-Vit-L-14``, ``-Vit-B-16Plus``) holds the text
tower alone: its vectors are in the space of an existing CLIP model, whose image tower comes from an open_clip
folder that the user names. The folder's own code is never run.

Source: ``MultilingualCLIP`` of the package ``multilingual_clip``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.clip_processors import tokenizer_of
from export.families.encoders import roberta_encoder_from_transformers
from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.image_encoders import image_encoder_from_open_clip
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.open_clip_checkpoint import text_config_of
from export.families.open_clip_images import ImageSide, image_side_from_folder
from export.families.open_clip_towers import ProjectedPool
from export.families.published import LICENCES, XLM_R_LANGUAGES
from export.families.references import MClipReference
from export.families.tokenizers import preprocessing_from_tokenizer, tokenizer_json
from export.families.transformers_models import WEIGHT_FILES
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

__all__ = ["FAMILY", "IMAGE_TOWERS"]

IMAGE_TOWERS: Mapping[str, str] = {
    "XLM-Roberta-Large-Vit-B-32": "timm/vit_base_patch32_clip_224.openai",
    "XLM-Roberta-Large-Vit-L-14": "timm/vit_large_patch14_clip_224.openai",
    "XLM-Roberta-Large-Vit-B-16Plus": "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
}
"""Image tower of each published text tower, as open_clip folders on the hub."""

_UNUSED = "transformer.pooler."
"""Prefix of XLM-R's own pooler: stored in M-CLIP's files but not used by its embeddings."""


class MClip(nn.Module):
    """Both towers with the published parameter names of the text tower, from their libraries' modules."""

    def __init__(self, transformer: nn.Module, linear: nn.Linear, visual: nn.Module) -> None:
        super().__init__()
        self.transformer, self.LinearTransformation, self.visual = transformer, linear, visual

    def text_features(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed ids and mask, both int64 (batch, tokens), to (batch, dim), not normalised."""
        hidden = self.transformer(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(2)
        return cast("Tensor", self.LinearTransformation((hidden * mask).sum(dim=1) / mask.sum(dim=1)))

    def image_features(self, pixels: Tensor) -> Tensor:
        """Embed pixels, float32 (batch, 3, height, width), to (batch, dim), not normalised."""
        return cast("Tensor", self.visual(pixels))


def claims(path: Path) -> bool:
    """Check for a folder of model type ``M-CLIP``."""
    config = folder_of(path) / "config.json"
    return config.is_file() and config_from_file(config).get("model_type") == "M-CLIP"


def load(path: Path, options: LoadOptions) -> Towers:
    """Read the text tower from its folder, the image tower from ``options.image_tower``.

    Raises:
        CheckpointError: no image tower is given, or its width differs; a file is missing or unreadable; the
            weights do not match the architecture exactly; or ``merge_adapter`` rejects the adapter.
    """
    folder = folder_of(path)
    weights = file_of(path) or chosen_weights(folder, WEIGHT_FILES)
    config = config_from_file(folder / "config.json")
    images = _image_side(folder, config, options.image_tower)
    text_config = _text_config(folder, config)
    model = MClip(*_text_modules(folder, config, text_config, weights), images.visual)
    licence = licence_of_folder(folder, "m-clip")
    source = {
        "weights": weights.name,
        "image_tower": folder_of(cast("Path", options.image_tower)).resolve().name,
    }
    reference_model = model
    if options.adapter is not None:
        reference_model = cast("MClip", merge_adapter(model, options.adapter, _probe(model, text_config)))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    # Without a configuration of a known type, transformers warns of M-CLIP's.
    tokenizer = tokenizer_of(folder, "XLMRobertaTokenizer", config=model.transformer.config)
    encoder = roberta_encoder_from_transformers(model.transformer)
    context_length = options.context_length or int(encoder.max_tokens)
    text = preprocessing_from_tokenizer(
        tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=encoder.pad_id,
        context_length=context_length,
        clean="none",
    )
    heads = MrlHeads({})
    pool = ProjectedPool(mean=True, projection=model.LinearTransformation)
    towers = Towers(
        family="m-clip",
        architecture=_architecture(text_config, images),
        licence=licence,
        dim=model.LinearTransformation.out_features,
        text=TextTowerModule(encoder, pool, heads).eval(),
        image=ImageTowerModule(
            image_encoder_from_open_clip(model.visual),
            heads,
            mean=images.preprocessing.mean,
            std=images.preprocessing.std,
        ).eval(),
        tokenizer_json=tokenizer_json(tokenizer),
        text_preprocessing=text,
        image_preprocessing=images.preprocessing,
        languages=XLM_R_LANGUAGES,
        reference=MClipReference(
            tokenizer=tokenizer,
            transform=images.transform,
            model=reference_model,
            context_length=context_length,
        ),
        source=source,
    )
    return with_fingerprint(towers, unmerged=None if options.adapter is None else [reference_model])


def _image_side(folder: Path, config: Mapping[str, Any], image_tower: Path | None) -> ImageSide:
    if image_tower is None:
        known = "; ".join(f"{text}: {image}" for text, image in IMAGE_TOWERS.items())
        raise CheckpointError(
            f"{folder} holds M-CLIP's text tower alone. Pass --image-tower with the open_clip folder or hub "
            f"name of the CLIP model that it was trained for. Published: {known}."
        )
    images, dim = image_side_from_folder(image_tower)
    if dim != config.get("numDims"):
        raise CheckpointError(
            f"The image tower {image_tower} gives vectors of {dim} components, but {folder} was trained for "
            f"one of {config.get('numDims')} (numDims). Pass the CLIP model that it was trained for."
        )
    return images


def _text_config(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of XLM-R, which M-CLIP's names only by ``modelBase``."""
    name = str(config.get("modelBase"))
    found = text_config_of(folder, name)
    if found.get("model_type") != "xlm-roberta":
        raise CheckpointError(
            f"{folder / 'config.json'} names the text model {name!r} (modelBase), of type "
            f"{found.get('model_type')!r}; only XLM-R is supported."
        )
    return found


def _text_modules(
    folder: Path, config: Mapping[str, Any], text_config: Mapping[str, Any], weights: Path
) -> tuple[nn.Module, nn.Linear]:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    parts = nn.Module()
    try:
        built = XLMRobertaConfig(**{k: v for k, v in text_config.items() if k != "model_type"})
        built._attn_implementation = "eager"
        parts.transformer = XLMRobertaModel(built, add_pooling_layer=False)
        parts.LinearTransformation = nn.Linear(int(config["transformerDimensions"]), int(config["numDims"]))
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe an M-CLIP text tower that can be built: "
            f"{type(error).__name__}: {in_one_line(error)}. Copy it again."
        ) from error
    state = without_wrappers(state_dict_from_file(weights), "LinearTransformation.", origin=weights)
    state = without_still_buffers(state, parts, origin=weights)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
    load_strictly(parts, kept, origin=weights)
    parts.eval().requires_grad_(False)
    return cast("nn.Module", parts.transformer), parts.LinearTransformation


def _probe(model: MClip, text_config: Mapping[str, Any]) -> Probe:
    pad_id = int(text_config["pad_token_id"])
    visual: Any = model.visual
    ids, pixels = random_inputs(
        n_tokens=int(text_config["vocab_size"]), pad_id=pad_id, image_size=visual.image_size
    )

    @torch.inference_mode()
    def vectors(candidate: nn.Module) -> dict[str, Tensor]:
        found: Any = candidate
        texts = found.text_features(ids, (ids != pad_id).long())
        return {"text": texts, "image": found.image_features(pixels)}

    return vectors


def _architecture(text: Mapping[str, Any], images: ImageSide) -> str:
    size = images.preprocessing
    name = f"XLM-R {text['hidden_size']}x{text['num_hidden_layers']}"
    return f"{name} + {type(images.visual).__name__} {size.height}x{size.width}"


FAMILY = Family(
    name="m-clip",
    claims=claims,
    load=load,
    licence=LICENCES["m-clip"],
    forms="folder of model type M-CLIP with XLM-R, and --image-tower with an open_clip folder",
    needs_image_tower=True,
)
