"""SigLIP 2 (arXiv 2502.14786): 64 tokens a text, padding read like any token, Gemma's tokenizer, lower case.

Forms: a transformers folder (``google/siglip2-base-patch16-224``, model type ``siglip``), and an open_clip
folder (``timm/ViT-B-16-SigLIP2``). The two clean texts differently: transformers converts to lower case, as
in training; open_clip also removes ASCII punctuation. Each is kept as its library has it.

The published transformers folders name the class ``GemmaTokenizer``, which keeps capitals and so gives other
vectors than the model was trained for; they are read as ``Siglip2Tokenizer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.clip_processors import image_processor_of, squashing_of
from export.families.encoders import (
    PositionedEncoder,
    clip_encoder_from_transformers,
    encoder_from_open_clip,
)
from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.image_encoders import SiglipVisionEncoder, image_encoder_from_open_clip
from export.families.licences import licence_of_folder, licence_with_adapter
from export.families.open_clip_checkpoint import OpenClipCheckpoint, checkpoint_from_folder
from export.families.open_clip_images import image_side_of_open_clip
from export.families.published import LICENCES, SIGLIP2_LANGUAGES
from export.families.references import OpenClipReference, UnmaskedReference
from export.families.tokenizers import (
    complete_tokenizer,
    has_tokenizer,
    preprocessing_from_tokenizer,
    tokenizer_errors,
    tokenizer_json,
)
from export.families.transformers_models import WEIGHT_FILES, model_from_folder
from export.fingerprint.fingerprints import with_fingerprint
from export.towers import ImageTowerModule, MrlHeads, TextTowerModule, Towers
from export.weights.adapter_merge import Probe, merge_adapter, random_inputs
from export.weights.tensors import chosen_weights, config_from_file
from runtime.errors import CheckpointError
from runtime.manifest import TextPreprocessing

__all__ = ["FAMILY"]

_NAME = "siglip2"
_CLEANINGS = ("canonicalize", "lower", "whitespace")


class LastPool(nn.Module):
    """SigLIP's pooling: norm and projection of the last position, (batch, tokens, width) → (batch, dim)."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool the last position; selected first, as the layer norm acts on each token separately."""
        return cast("Tensor", self.projection(self.norm(hidden[:, -1])))


def claims(path: Path) -> bool:
    """Check for a transformers folder of a SigLIP type, or an open_clip folder that names SigLIP 2."""
    folder = folder_of(path)
    if (folder / "open_clip_config.json").is_file():
        return "siglip2" in str(_text_config(folder).get("hf_tokenizer_name", "")).lower()
    config = folder / "config.json"
    return config.is_file() and config_from_file(config).get("model_type") in ("siglip", "siglip2")


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not match the architecture exactly,
            the checkpoint is of the first SigLIP or of variable resolution (NaFlex), another context length
            is asked for, or ``merge_adapter`` rejects the adapter.
    """
    folder = folder_of(path)
    if (folder / "open_clip_config.json").is_file():
        return _from_open_clip(folder, file_of(path), options)
    return _from_transformers(folder, file_of(path), options)


def _from_transformers(folder: Path, weights: Path | None, options: LoadOptions) -> Towers:
    config = config_from_file(folder / "config.json")
    if config.get("model_type") != "siglip":
        raise CheckpointError(
            f"{folder} holds a SigLIP 2 of variable resolution (NaFlex, type {config['model_type']!r}), "
            "whose images have no fixed size. Only the checkpoints of a fixed resolution are supported, such "
            "as google/siglip2-base-patch16-224."
        )
    weights = weights or chosen_weights(folder, WEIGHT_FILES)
    tokenizer = _tokenizer(folder)
    model = model_from_folder(folder, weights, config_kind="SiglipConfig", model_kind="SiglipModel")
    if not getattr(model.vision_model, "use_head", True):
        raise CheckpointError(f"{folder} has an image tower without SigLIP's pooling head (vision_use_head).")
    processor = image_processor_of(folder, "SiglipImageProcessor")
    processor.do_convert_rgb = True  # the published files leave it open, and grey images have one channel
    encoder = clip_encoder_from_transformers(model.text_model, causal=False)
    text = _text_preprocessing(tokenizer, encoder, options, clean="none")
    images = squashing_of(processor, folder)
    reference_model, source, licence = model, {"weights": weights.name}, licence_of_folder(folder, _NAME)
    if options.adapter is not None:
        reference_model = merge_adapter(
            model, options.adapter, _probe(encoder, text, images.height, open_clip=False)
        )
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    heads = MrlHeads({})
    pool = LastPool(model.text_model.final_layer_norm, model.text_model.head)
    towers = Towers(
        family=_NAME,
        architecture=_architecture(model.config),
        licence=licence,
        dim=int(model.text_model.head.out_features),
        text=TextTowerModule(encoder, pool, heads).eval(),
        image=ImageTowerModule(
            SiglipVisionEncoder(model.vision_model), heads, mean=images.mean, std=images.std
        ).eval(),
        tokenizer_json=tokenizer_json(tokenizer),
        text_preprocessing=text,
        image_preprocessing=images,
        languages=SIGLIP2_LANGUAGES,
        reference=UnmaskedReference(
            tokenizer=tokenizer,
            image_processor=processor,
            model=reference_model,
            context_length=text.context_length,
        ),
        source=source,
    )
    parts = [reference_model.text_model, reference_model.vision_model]
    return with_fingerprint(towers, unmerged=None if options.adapter is None else parts)


def _from_open_clip(folder: Path, weights: Path | None, options: LoadOptions) -> Towers:
    checkpoint = checkpoint_from_folder(folder, weights=weights, own_text=True)
    model = checkpoint.model
    _require_siglip_text(model.text, folder)
    tokenizer = _open_clip_tokenizer(checkpoint)
    encoder = encoder_from_open_clip(model.text)
    text = _text_preprocessing(
        tokenizer.tokenizer, encoder, options, clean=_cleaning(checkpoint.model_config["text_cfg"], folder)
    )
    images = image_side_of_open_clip(model.visual, checkpoint.preprocess_config)
    reference_model, source = model, {"weights": checkpoint.weights.name}
    licence = licence_of_folder(folder, _NAME)
    if options.adapter is not None:
        size = images.preprocessing.height
        reference_model = merge_adapter(model, options.adapter, _probe(encoder, text, size, open_clip=True))
        source |= {"adapter": options.adapter.folder.resolve().name, "base": folder.resolve().name}
        licence = licence_with_adapter(licence, options.adapter.folder)
    heads = MrlHeads({})
    reference = OpenClipReference(
        tokenizer=tokenizer,
        transform=images.transform,
        text=reference_model.text.eval(),
        visual=reference_model.visual.eval(),
        heads=heads,
        needs_language=False,
    )
    towers = Towers(
        family=_NAME,
        architecture=checkpoint.architecture,
        licence=licence,
        dim=int(checkpoint.model_config["embed_dim"]),
        text=TextTowerModule(
            encoder, LastPool(model.text.ln_final, model.text.text_projection), heads
        ).eval(),
        image=ImageTowerModule(
            image_encoder_from_open_clip(model.visual),
            heads,
            mean=images.preprocessing.mean,
            std=images.preprocessing.std,
        ).eval(),
        tokenizer_json=tokenizer_json(tokenizer.tokenizer),
        text_preprocessing=text,
        image_preprocessing=images.preprocessing,
        languages=SIGLIP2_LANGUAGES,
        reference=reference,
        source=source,
    )
    parts = (reference.text, reference.visual)
    return with_fingerprint(towers, unmerged=None if options.adapter is None else parts)


def _text_config(folder: Path) -> Mapping[str, Any]:
    model = config_from_file(folder / "open_clip_config.json").get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, dict) else None
    return text if isinstance(text, dict) else {}


def _text_preprocessing(
    tokenizer: Any, encoder: PositionedEncoder, options: LoadOptions, *, clean: str
) -> TextPreprocessing:
    length = encoder.max_tokens
    if options.context_length not in (None, length):
        raise CheckpointError(
            f"A context length of {options.context_length} was asked for, but SigLIP 2 reads the padding of "
            f"every text up to its {length} tokens: with any other length all vectors would change. Leave "
            "--context-length out."
        )
    return preprocessing_from_tokenizer(
        tokenizer,
        n_tokens=encoder.tokens.num_embeddings,
        pad_id=None,
        context_length=length,
        clean=clean,
        padding="context",
    )


def _tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a transformers folder as the class that converts to lower case."""
    from transformers import Siglip2Tokenizer

    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, which holds SigLIP 2's tokenizer. Copy the checkpoint folder "
            "again, whole."
        )
    path = folder / "tokenizer_config.json"
    config = config_from_file(path) if path.is_file() else {}
    kind = str(config.get("tokenizer_class") or "Siglip2Tokenizer").removesuffix("Fast")
    if kind not in ("GemmaTokenizer", "Siglip2Tokenizer"):
        raise CheckpointError(
            f"{path} names a {kind}, but SigLIP 2 has Gemma's tokenizer. Checkpoints of the first SigLIP are "
            "not supported."
        )
    with tokenizer_errors(str(folder), folder):
        return _padded_right(
            Siglip2Tokenizer.from_pretrained(
                str(folder),
                local_files_only=True,
                **({} if "padding_side" in config else {"padding_side": "right"}),
            ),
            folder,
        )


def _open_clip_tokenizer(checkpoint: OpenClipCheckpoint) -> Any:
    from open_clip.tokenizer import HFTokenizer

    folder = checkpoint.weights.parent
    text = checkpoint.model_config["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    with (
        tokenizer_errors(checkpoint.tokenizer_source, folder),
        complete_tokenizer(checkpoint.tokenizer_source, "GemmaTokenizer") as source,
    ):
        tokenizer = HFTokenizer(source, context_length=text.get("context_length", 77), **options)
    _padded_right(tokenizer.tokenizer, folder)
    return tokenizer


def _padded_right(tokenizer: Any, folder: Path) -> Any:
    if tokenizer.padding_side != "right":
        raise CheckpointError(
            f"The tokenizer of {folder} pads on the {tokenizer.padding_side}, but SigLIP 2 was trained with "
            "padding on the right. Set padding_side to 'right' in tokenizer_config.json."
        )
    return tokenizer


def _cleaning(text: Mapping[str, Any], folder: Path) -> str:
    """Return open_clip's text cleaning, after checking that nothing else changes the token ids."""
    options = text.get("tokenizer_kwargs") or {}
    clean = options.get("clean", "whitespace") if isinstance(options, dict) else None
    if clean not in _CLEANINGS or options.get("strip_sep_token") or text.get("tokenizer_mode") is not None:
        raise CheckpointError(
            f"{folder / 'open_clip_config.json'} has tokenizer_kwargs {options!r} and tokenizer_mode "
            f"{text.get('tokenizer_mode')!r}; expected a clean of {list(_CLEANINGS)} and neither "
            "strip_sep_token nor a mode."
        )
    return str(clean)


def _require_siglip_text(text: Any, folder: Path) -> None:
    found = (text.pool_type, text.attn_mask is None, isinstance(text.text_projection, nn.Linear))
    if found != ("last", True, True):
        raise CheckpointError(
            f"{folder / 'open_clip_config.json'} names SigLIP 2's tokenizer, but its text tower pools by "
            f"{text.pool_type!r}, or is causal, or has no biased projection. Copy the published file again."
        )


def _probe(encoder: PositionedEncoder, text: TextPreprocessing, image_size: int, *, open_clip: bool) -> Probe:
    ids, pixels = random_inputs(
        n_tokens=encoder.tokens.num_embeddings, pad_id=text.pad_id, image_size=image_size
    )

    @torch.inference_mode()
    def vectors(candidate: nn.Module) -> dict[str, Tensor]:
        found: Any = candidate
        if open_clip:
            return {"text": found.text(ids), "image": found.visual(pixels)}
        texts = found.get_text_features(ids).pooler_output
        return {"text": texts, "image": found.get_image_features(pixels).pooler_output}

    return vectors


def _architecture(config: Any) -> str:
    text, vision = config.text_config, config.vision_config
    return (
        f"SigLIP {text.hidden_size}x{text.num_hidden_layers} + "
        f"ViT {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}"
    )


FAMILY = Family(
    name=_NAME,
    claims=claims,
    load=load,
    licence=LICENCES[_NAME],
    forms="transformers SiglipModel folder with Gemma's tokenizer; open_clip folder that names SigLIP2",
)
