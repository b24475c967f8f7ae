"""From an open_clip model to ``Towers``: what NLLB-CLIP and CAPIVARA share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from export.encoders import TextEncoder, m2m_encoder_from_transformers, roberta_encoder_from_transformers
from export.fingerprints import embedding_space_fingerprint
from export.image_encoders import image_encoder_from_open_clip
from export.licences import licence_of_folder
from export.open_clip_checkpoint import OpenClipCheckpoint
from export.published import XLM_R_LANGUAGES
from export.references import OpenClipReference
from export.tokenizers import preprocessing_from_tokenizer, tokenizer_json
from export.towers import ImageTower, MrlHeads, TextTower, Towers
from runtime.errors import CheckpointError
from runtime.manifest import ImagePreprocessing, triple

__all__ = ["towers_from_open_clip"]


class ProjectedPool(nn.Module):
    """open_clip's pooler, then its projection: hidden states (batch, tokens, width) → (batch, dim)."""

    def __init__(self, *, mean: bool, projection: nn.Module) -> None:
        super().__init__()
        self.mean, self.projection = mean, projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean over the tokens that stand, or the state at position 0."""
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
    text: nn.Module | None = None,
    reference_text: nn.Module | None = None,
    heads: Mapping[int, nn.Linear] | None = None,
    context_length: int | None = None,
    source: Mapping[str, Any],
) -> Towers:
    """Assemble towers; ``text`` and ``reference_text`` replace the model's own (a merged and unmerged LoRA).

    Raises:
        CheckpointError: a pooler, text model, tokenizer or preprocessing that no family has.
    """
    text = text or checkpoint.model.text
    mrl = MrlHeads(heads or {})
    context_length = context_length or int(checkpoint.model_config["text_cfg"].get("context_length", 77))
    tokenizer = _tokenizer(checkpoint, context_length)
    encoder = _text_encoder(text)
    text_preprocessing = preprocessing_from_tokenizer(
        tokenizer.tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        context_length=context_length,
        clean="whitespace",
    )
    if checkpoint.text_config["model_type"] == "m2m_100" and not text_preprocessing.needs_language:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.tokenizer_source} has no language tokens, which NLLB needs. "
            "Copy the checkpoint's own tokenizer files beside its weights."
        )
    preprocess = _preprocess_config(checkpoint)
    image_preprocessing = _image_preprocessing(preprocess)
    serialised = tokenizer_json(tokenizer.tokenizer)
    text_tower = TextTower(encoder, _pool(text), mrl, hidden_id=text_preprocessing.pad_id).eval()
    image_tower = ImageTower(
        image_encoder_from_open_clip(checkpoint.model.visual),
        mrl,
        mean=image_preprocessing.mean,
        std=image_preprocessing.std,
    ).eval()
    reference = OpenClipReference(
        tokenizer=tokenizer,
        transform=_transform(preprocess),
        text=(reference_text or text).eval(),
        visual=checkpoint.model.visual,
        heads=mrl,
        needs_language=text_preprocessing.needs_language,
    )
    return Towers(
        family=family,
        architecture=checkpoint.architecture,
        licence=licence_of_folder(checkpoint.weights.parent, family),
        dim=int(checkpoint.model_config["embed_dim"]),
        text=text_tower,
        image=image_tower,
        tokenizer_json=serialised,
        text_preprocessing=text_preprocessing,
        image_preprocessing=image_preprocessing,
        languages=tuple(text_preprocessing.language_ids) or XLM_R_LANGUAGES,
        reference=reference,
        fingerprint=embedding_space_fingerprint(
            text_tower,
            image_tower,
            tokenizer_json=serialised,
            text_preprocessing=text_preprocessing,
            image_preprocessing=image_preprocessing,
            reference=reference,
            weights=_unmerged_weights(reference),
        ),
        source=source,
    )


def _unmerged_weights(reference: OpenClipReference) -> list[Tensor] | None:
    """Weights of a model with its adapter's layers beside the base's; ``None`` without an adapter."""
    parts = (reference.text, reference.visual, reference.heads)
    if not any(type(module).__module__.startswith("peft.") for part in parts for module in part.modules()):
        return None
    return [tensor for part in parts for tensor in part.state_dict().values()]


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
    configured = dict(checkpoint.model_config["text_cfg"].get("tokenizer_kwargs", {}))
    if configured.pop("clean", "whitespace") != "whitespace" or configured.pop("strip_sep_token", False):
        raise CheckpointError(
            "A tokenizer with other cleaning than open_clip's 'whitespace' is not supported."
        )
    if nllb:  # else the language token stands last and position 0 is no language (transformers#22313)
        configured["legacy_behaviour"] = False
    try:
        return HFTokenizer(checkpoint.tokenizer_source, context_length=context_length, **configured)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"The tokenizer {checkpoint.tokenizer_source!r} cannot be loaded ({str(error).splitlines()[0]}). "
            f"Put tokenizer.json or sentencepiece.bpe.model into {checkpoint.weights.parent}."
        ) from error


def _preprocess_config(checkpoint: OpenClipCheckpoint) -> Any:
    from open_clip.transform import PreprocessCfg

    try:
        return PreprocessCfg(**{"size": checkpoint.model.visual.image_size, **checkpoint.preprocess_config})
    except (TypeError, AssertionError) as error:
        raise CheckpointError(
            f"preprocess_cfg {dict(checkpoint.preprocess_config)} is not open_clip's: {error}."
        ) from error


def _transform(config: Any) -> Any:
    from open_clip.transform import image_transform_v2

    return image_transform_v2(config, is_train=False)


def _image_preprocessing(config: Any) -> ImagePreprocessing:
    if config.mode != "RGB":
        raise CheckpointError(f"Image mode {config.mode!r} is not supported; expected 'RGB'.")
    size = config.size if isinstance(config.size, (tuple, list)) else (config.size, config.size)
    if config.resize_mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"resize_mode {config.resize_mode!r} is not supported; expected shortest or squash."
        )
    return ImagePreprocessing(
        height=int(size[0]),
        width=int(size[1]),
        resize=config.resize_mode,
        interpolation=config.interpolation,
        order="resize-convert",
        crop_rounding="round",
        mean=triple(config.mean),
        std=triple(config.std),
    )
