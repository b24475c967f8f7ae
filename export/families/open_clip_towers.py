"""Towers of open_clip models with a text tower from transformers, shared by their families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.families.encoders import (
    TextEncoder,
    m2m_encoder_from_transformers,
    roberta_encoder_from_transformers,
)
from export.families.family import LoadOptions
from export.families.image_encoders import image_encoder_from_open_clip
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.open_clip_checkpoint import OpenClipCheckpoint
from export.families.open_clip_images import image_side_of_open_clip
from export.families.published import XLM_R_LANGUAGES
from export.families.references import OpenClipReference
from export.families.tokenizers import (
    complete_tokenizer,
    preprocessing_from_tokenizer,
    tokenizer_errors,
    tokenizer_json,
)
from export.fingerprint.fingerprints import with_fingerprint
from export.towers import ImageTowerModule, MrlHeads, TextTowerModule, Towers
from export.weights.adapter_merge import Probe, merge_adapter, random_inputs
from export.weights.tensors import config_from_file
from runtime.errors import CheckpointError

__all__ = ["towers_from_open_clip"]


class ProjectedPool(nn.Module):
    """Pooler and projection of open_clip: hidden states (batch, tokens, width) → (batch, dim)."""

    def __init__(self, *, mean: bool, projection: nn.Module) -> None:
        super().__init__()
        self.mean, self.projection = mean, projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool by the mean over unmasked tokens, or by the state at position 0, then project."""
        if self.mean:
            mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        else:
            pooled = hidden[:, 0]
        projected: Tensor = self.projection(pooled)
        return projected


def towers_from_open_clip(
    checkpoint: OpenClipCheckpoint,
    *,
    family: str,
    options: LoadOptions,
    heads: Mapping[int, nn.Linear] | None = None,
) -> Towers:
    """Build towers from an open_clip model; an adapter is merged first, but left unmerged in the reference.

    Raises:
        CheckpointError: the pooler, text model, tokenizer or preprocessing is not supported, or
            ``merge_adapter`` rejects the adapter.
    """
    model, source = checkpoint.model, {"weights": checkpoint.weights.name}
    folder = checkpoint.weights.parent
    licence = licence_of_folder(folder, family)
    reference_model = model
    if options.adapter is not None:
        reference_model = merge_adapter(model, options.adapter, _probe(checkpoint))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    mrl = MrlHeads(heads or {})
    context_length = options.context_length or _context_length(checkpoint)
    tokenizer = _tokenizer(checkpoint, context_length)
    encoder = _text_encoder(model.text)
    text_preprocessing = preprocessing_from_tokenizer(
        tokenizer.tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=encoder.pad_id,
        context_length=context_length,
        clean="whitespace",
    )
    if checkpoint.text_config["model_type"] == "m2m_100" and not text_preprocessing.needs_language:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.tokenizer_source} has no language tokens, which NLLB needs. "
            "Copy the checkpoint's own tokenizer files beside its weights."
        )
    images = image_side_of_open_clip(model.visual, checkpoint.preprocess_config)
    serialised = tokenizer_json(tokenizer.tokenizer)
    text_tower = TextTowerModule(encoder, _pool(model.text), mrl, hidden_id=text_preprocessing.pad_id).eval()
    image_tower = ImageTowerModule(
        image_encoder_from_open_clip(model.visual),
        mrl,
        mean=images.preprocessing.mean,
        std=images.preprocessing.std,
    ).eval()
    reference = OpenClipReference(
        tokenizer=tokenizer,
        transform=images.transform,
        text=reference_model.text.eval(),
        visual=reference_model.visual.eval(),
        heads=mrl,
        needs_language=text_preprocessing.needs_language,
    )
    parts = (reference.text, reference.visual, mrl)
    towers = Towers(
        family=family,
        architecture=checkpoint.architecture,
        licence=licence,
        dim=int(checkpoint.model_config["embed_dim"]),
        text=text_tower,
        image=image_tower,
        tokenizer_json=serialised,
        text_preprocessing=text_preprocessing,
        image_preprocessing=images.preprocessing,
        languages=tuple(text_preprocessing.language_ids) or XLM_R_LANGUAGES,
        reference=reference,
        source=source,
    )
    return with_fingerprint(towers, unmerged=None if options.adapter is None else parts)


def _probe(checkpoint: OpenClipCheckpoint) -> Probe:
    """Return a function that embeds four random texts, two of them padded, and two random images."""
    ids, pixels = random_inputs(
        n_tokens=int(checkpoint.text_config["vocab_size"]),
        pad_id=int(checkpoint.text_config["pad_token_id"]),
        image_size=checkpoint.model.visual.image_size,
    )

    @torch.inference_mode()
    def vectors(model: nn.Module) -> dict[str, Tensor]:
        adapted: Any = model
        return {"text": adapted.text(ids), "image": adapted.visual(pixels)}

    return vectors


def _context_length(checkpoint: OpenClipCheckpoint) -> int:
    found = checkpoint.model_config["text_cfg"].get("context_length")
    found = 77 if found is None else found
    if type(found) is not int or found < 1:
        raise CheckpointError(
            f"open_clip_config.json has a context_length of {found!r}; expected a number of tokens such "
            "as 77."
        )
    return found


def _text_encoder(text: Any) -> TextEncoder:
    if text.config.model_type == "m2m_100":
        return m2m_encoder_from_transformers(text.transformer)
    return roberta_encoder_from_transformers(text.transformer)


def _pool(text: Any) -> ProjectedPool:
    pooler = type(text.pooler).__name__
    if pooler not in ("MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler"):
        raise CheckpointError(f"Pooler {pooler} is not supported; expected mean_pooler or cls_pooler.")
    if pooler == "ClsPooler" and getattr(text.transformer, "pooler", None) is not None:
        raise CheckpointError("XLM-R's own tanh pooler (cls_pooler) is not supported; expected mean_pooler.")
    return ProjectedPool(mean=pooler == "MeanPooler", projection=text.proj)


def _tokenizer(checkpoint: OpenClipCheckpoint, context_length: int) -> Any:
    from open_clip.tokenizer import HFTokenizer

    nllb = checkpoint.text_config["model_type"] == "m2m_100"
    mode = checkpoint.model_config["text_cfg"].get("tokenizer_mode")
    if mode is not None:
        raise CheckpointError(
            f"open_clip_config.json sets tokenizer_mode {mode!r}, which makes open_clip's token ids differ "
            "from the tokenizer's; only null is supported."
        )
    configured = checkpoint.model_config["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(configured, dict):
        raise CheckpointError(
            f"open_clip_config.json has tokenizer_kwargs {configured!r}; expected a JSON object."
        )
    configured = dict(configured)
    if configured.pop("clean", "whitespace") != "whitespace" or configured.pop("strip_sep_token", False):
        raise CheckpointError(
            "Only open_clip's text cleaning 'whitespace' is supported, without strip_sep_token."
        )
    if nllb:  # otherwise the language token comes last, not at position 0 (transformers#22313)
        _require_language_first(checkpoint)
        configured["legacy_behaviour"] = False
    kind = "NllbTokenizer" if nllb else "XLMRobertaTokenizer"
    with (
        tokenizer_errors(checkpoint.tokenizer_source, checkpoint.weights.parent),
        complete_tokenizer(checkpoint.tokenizer_source, kind) as source,
    ):
        return HFTokenizer(source, context_length=context_length, **configured)


def _require_language_first(checkpoint: OpenClipCheckpoint) -> None:
    path = Path(checkpoint.tokenizer_source) / "tokenizer_config.json"
    if path.is_file() and config_from_file(path).get("legacy_behaviour"):
        raise CheckpointError(
            f"{path} sets legacy_behaviour, which puts the language token last, while NLLB-CLIP pools "
            "position 0. Set it to false if the checkpoint was trained that way (the published ones were)."
        )
