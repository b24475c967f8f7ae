"""Load open_clip checkpoints from disk: model, preprocessing and tokenizer.

No network is used: the folder's own files come first, then the published configurations shipped with this
project, then the local hub cache. The model is open_clip's own and also serves as the parity reference.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.families.published import TEXT_CONFIGS
from export.families.tokenizers import has_tokenizer
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

__all__ = [
    "WEIGHT_FILES",
    "OpenClipCheckpoint",
    "architecture_config",
    "checkpoint_from_folder",
    "find_weights",
    "model_from_config",
    "text_config_of",
    "text_model_name",
    "text_model_type",
]

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.bin.index.json",
    "open_clip_pytorch_model.pth",
    "open_clip_pytorch_model.pt",
)
"""Weight file names, in ``open_clip``'s order of preference."""

_SEQ2SEQ_REST = ("text.transformer.decoder.", "text.transformer.lm_head.", "text.lm_head.")
"""Prefixes of M2M100 parameters outside the encoder, which embeddings do not use."""


@dataclass(frozen=True, slots=True)
class OpenClipCheckpoint:
    """Open_clip model with loaded weights, and the configurations it was built from.

    ``text_config`` is the configuration of a transformers text model, empty for a text tower of open_clip.
    """

    model: Any
    model_config: Mapping[str, Any]
    preprocess_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tokenizer_source: str
    weights: Path
    architecture: str


def checkpoint_from_folder(
    folder: Path,
    *,
    architecture: str | None = None,
    weights: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
    own_text: bool = False,
) -> OpenClipCheckpoint:
    """Build the model that a folder describes and load its weights strictly.

    ``architecture`` is an open_clip name for a folder without ``open_clip_config.json`` (CAPIVARA's
    Lightning checkpoint, an MRL folder); ``weights`` selects the file, ``state`` is its content if already
    loaded. ``own_text`` expects a text tower of open_clip instead of one from transformers.

    Raises:
        CheckpointError: a file is missing or unreadable, the text model is unknown, or the weights do not
            match.
    """
    config = _config_of_folder(folder, architecture, own_text=own_text)
    model_config = _with_own_trunk(config["model_cfg"], folder)
    preprocess_config = config.get("preprocess_cfg") or {}
    if not isinstance(preprocess_config, dict):
        raise CheckpointError(
            f"{folder / 'open_clip_config.json'} has a preprocess_cfg that is {preprocess_config!r}; "
            "expected an object with mean, std, interpolation and resize_mode."
        )
    weights = weights or find_weights(folder)
    text_config: Mapping[str, Any] = {}
    if not own_text:
        text_config = text_config_of(folder, str(model_config["text_cfg"]["hf_model_name"]))
    model = model_from_config(model_config, text_config)
    _load(model, state_dict_from_file(weights) if state is None else state, weights)
    tokenizer_name = str(model_config["text_cfg"].get("hf_tokenizer_name") or "")
    return OpenClipCheckpoint(
        model=model.eval().requires_grad_(False),
        model_config=model_config,
        preprocess_config=preprocess_config,
        text_config=text_config,
        tokenizer_source=str(folder) if has_tokenizer(folder) else tokenizer_name,
        weights=weights,
        architecture=_name_of_architecture(model_config, text_config),
    )


def architecture_config(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a published architecture.

    Raises:
        CheckpointError: open_clip has no architecture of that name.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise CheckpointError(
            f"open_clip has no architecture {name!r}. Update open_clip_torch, or add open_clip_config.json."
        )
    return dict(config)


def model_from_config(model_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> Any:
    """Build an untrained open_clip model in FP32, offline, with its text model from ``text_config``, if any.

    Raises:
        CheckpointError: open_clip or timm cannot build the configuration.
    """
    from open_clip.model import CustomTextCLIP

    config = copy.deepcopy(dict(model_config))
    config.pop("custom_text", None)
    config["vision_cfg"] = {**config["vision_cfg"], "output_tokens": False}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    with _folder_of_config(text_config) as folder:
        if text_config:
            named = {"hf_model_name": folder, "hf_model_pretrained": False}
            config["text_cfg"] = {**config["text_cfg"], **named, "output_tokens": False}
        try:
            return CustomTextCLIP(**config).float()
        except Exception as error:  # open_clip, timm and transformers each have errors of their own
            if isinstance(error, MemoryError):
                raise
            raise CheckpointError(
                f"open_clip cannot build this model: {type(error).__name__}: {in_one_line(error)}. Its "
                "open_clip_config.json or config.json names an architecture, an option or a value that the "
                "installed open_clip, timm and transformers do not support."
            ) from error


def find_weights(folder: Path, *, apart_from: Sequence[str] = ()) -> Path:
    """Return the open_clip weight file of a folder, safetensors first.

    Raises:
        CheckpointError: no weight file, or several of which none has an open_clip name.
    """
    try:
        return chosen_weights(folder, WEIGHT_FILES, apart_from=apart_from)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("holds no weights", "holds no open_clip weights")) from None


def text_model_name(folder: Path) -> str | None:
    """Return the hub name of the text model in ``open_clip_config.json``; None without either.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    path = folder / "open_clip_config.json"
    if not path.is_file():
        return None
    model = config_from_file(path).get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, dict) else None
    name = text.get("hf_model_name") if isinstance(text, dict) else None
    return str(name) if name else None


def text_model_type(folder: Path) -> str | None:
    """Return the model type of the text tower named in ``open_clip_config.json``; None without a name.

    Raises:
        CheckpointError: a configuration cannot be read.
    """
    name = text_model_name(folder)
    return str(text_config_of(folder, name).get("model_type")) if name else None


def text_config_of(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the text model's transformers configuration: the folder's, the shipped one or the hub cache's.

    Raises:
        CheckpointError: none of the three has it.
    """
    own = folder / "config.json"
    if own.is_file():
        config = config_from_file(own)
        if config.get("model_type") in ("m2m_100", "xlm-roberta"):
            return config
    if name in TEXT_CONFIGS:
        return TEXT_CONFIGS[name]
    from transformers import AutoConfig

    try:
        found: Mapping[str, Any] = AutoConfig.from_pretrained(name, local_files_only=True).to_dict()
    except Exception as error:
        raise CheckpointError(
            f"The text model {name!r} is unknown: {own} does not describe it, it is not one of "
            f"{sorted(TEXT_CONFIGS)}, and the local hub cache has no copy. Put its config.json into {folder}."
        ) from error
    return found


def _load(model: nn.Module, found: Mapping[str, Tensor], origin: Path) -> None:
    state = _encoder_alone(without_wrappers(found, "visual.", origin=origin), model, origin)
    state = without_still_buffers(state, model, origin=origin)
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # scalar or (1,), and absent from some: neither is embedded
        if name in wanted and state.get(name, wanted[name]).numel() == 1:
            state[name] = state.get(name, wanted[name]).reshape(wanted[name].shape)
        elif name not in wanted:
            state.pop(name, None)
    load_strictly(model, state, origin=origin)


def _encoder_alone(state: dict[str, Tensor], model: nn.Module, origin: Path) -> dict[str, Tensor]:
    """Select and rename the encoder's weights if the text tower was saved as a complete M2M100."""
    whole = any(name.startswith("text.transformer.encoder.layers.") for name in state)
    if not whole or "text.transformer.layer_norm.weight" not in model.state_dict():
        return state
    shared = state.pop("text.transformer.shared.weight", None)
    kept = {
        name.replace("text.transformer.encoder.", "text.transformer.", 1): tensor
        for name, tensor in state.items()
        if not name.startswith(_SEQ2SEQ_REST)
    }
    tokens = "text.transformer.embed_tokens.weight"
    if shared is not None and not torch.equal(kept.setdefault(tokens, shared), shared):
        raise CheckpointError(
            f"{origin} holds two different token tables, text.transformer.shared and encoder.embed_tokens. "
            "Save only the encoder."
        )
    return kept


def _config_of_folder(folder: Path, architecture: str | None, *, own_text: bool) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    if architecture is not None and not path.is_file():
        return {"model_cfg": architecture_config(architecture)}
    config = config_from_file(path)
    model_config = config.get("model_cfg")
    if (
        not isinstance(model_config, dict)
        or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys()
        or not all(isinstance(model_config[part], dict) for part in ("vision_cfg", "text_cfg"))
    ):
        raise CheckpointError(
            f"{path} does not describe a model: expected 'model_cfg' with embed_dim, vision_cfg and text_cfg."
        )
    if not own_text and not model_config["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"{path} describes an open_clip model whose text tower is not a Hugging Face encoder. "
            "Only NLLB (m2m_100) and XLM-R text towers are supported."
        )
    return config


def _with_own_trunk(model_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve timm's ``local-dir:`` against the checkpoint's folder instead of the working directory."""
    vision = model_config["vision_cfg"]
    name = str(vision.get("timm_model_name", ""))
    own = folder / Path(name.removeprefix("local-dir:")).name
    if name.startswith("local-dir:") and (own / "config.json").is_file():
        vision = {**vision, "timm_model_name": f"local-dir:{own}"}
    return {**model_config, "vision_cfg": vision}


def _name_of_architecture(model_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> str:
    """Return open_clip's name of the architecture, or else the towers' widths and depths."""
    import open_clip

    parts = ("embed_dim", "vision_cfg", "text_cfg")
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)
        if all(known.get(part) == model_config.get(part) for part in parts):
            return str(name)
    vision = model_config["vision_cfg"]
    own = model_config["text_cfg"]
    width = text_config.get("d_model") or text_config.get("hidden_size") or own.get("width")
    n_layers = text_config.get("encoder_layers") or text_config.get("num_hidden_layers") or own.get("layers")
    if timm_name := str(vision.get("timm_model_name", "")):
        image = timm_name.rpartition("/")[2]
    else:
        image = f"ViT {vision['width']}x{vision['layers']}/{vision['patch_size']}"
    return f"{text_config.get('model_type', 'transformer')} {width}x{n_layers} + {image}"


@contextmanager
def _folder_of_config(config: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        yield os.fspath(folder)
