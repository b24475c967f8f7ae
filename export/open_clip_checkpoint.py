"""open_clip checkpoints on disk → an open_clip model, its preprocessing and its tokenizer.

Read with no network: the folder's own files first, then the published facts this project ships, then the
local hub cache. The model that is built is the library's own; it also serves as the parity reference.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from export.published import TEXT_CONFIGS
from export.tokenizers import has_tokenizer
from export.weights import config_from_file, load_strictly, state_dict_from_file, without_prefix
from runtime.errors import CheckpointError

__all__ = ["OpenClipCheckpoint", "architecture_config", "checkpoint_from_folder", "model_from_config"]

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
_POSITION_IDS = "text.transformer.embeddings.position_ids"  # in weights saved by transformers < 4.31
_PREFIXES = ("model.model.", "model.", "module.")  # Lightning's, the MRL wrapper's, DataParallel's


@dataclass(frozen=True, slots=True)
class OpenClipCheckpoint:
    """An open_clip model with its weights in place, and the configurations it was built from."""

    model: Any
    model_config: Mapping[str, Any]
    preprocess_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tokenizer_source: str
    weights: Path
    architecture: str


def checkpoint_from_folder(
    folder: Path, *, architecture: str | None = None, weights: Path | None = None
) -> OpenClipCheckpoint:
    """Build the model that a folder describes and load its weights.

    ``architecture`` is an open_clip name for a folder without ``open_clip_config.json`` (CAPIVARA's
    Lightning checkpoint, an MRL folder); ``weights`` picks the file.

    Raises:
        CheckpointError: a missing or unreadable file, an unknown text model, or weights that do not fit.
    """
    config = _config_of_folder(folder, architecture)
    model_config = _with_own_trunk(config["model_cfg"], folder)
    preprocess_config = config.get("preprocess_cfg", {})
    weights = weights or find_weights(folder)
    text_config = text_config_of(folder, str(model_config["text_cfg"]["hf_model_name"]))
    state = open_clip_state(state_dict_from_file(weights))
    model = model_from_config(model_config, text_config)
    _load(model, state, weights)
    tokenizer_name = str(model_config["text_cfg"].get("hf_tokenizer_name", ""))
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
    """open_clip's own configuration of a published architecture.

    Raises:
        CheckpointError: open_clip knows no such name.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise CheckpointError(
            f"open_clip knows no architecture {name!r}. Update open_clip_torch, or add open_clip_config.json."
        )
    return dict(config)


def model_from_config(model_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> Any:
    """An untrained open_clip model in FP32, its text model built from ``text_config`` without a network.

    Raises:
        CheckpointError: the configuration asks for what open_clip or timm cannot build.
    """
    from open_clip.model import CustomTextCLIP

    config = copy.deepcopy(dict(model_config))
    config.pop("custom_text", None)
    config["vision_cfg"] = {**config["vision_cfg"], "output_tokens": False}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    with _folder_of_config(text_config) as folder:
        config["text_cfg"] = {
            **config["text_cfg"],
            "hf_model_name": folder,
            "hf_model_pretrained": False,
            "output_tokens": False,
        }
        try:
            return CustomTextCLIP(**config).float()
        except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise CheckpointError(
                f"open_clip cannot build this model: {error}. Its open_clip_config.json names an "
                "architecture or an option that this version of open_clip and timm does not have."
            ) from error


def find_weights(folder: Path) -> Path:
    """The open_clip weight file of a folder, safetensors first.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".ckpt"))
    raise CheckpointError(
        f"{folder} holds no open_clip weights; expected one of {list(WEIGHT_FILES)}, found {found}. "
        "Copy the checkpoint folder again, whole."
    )


def text_config_of(folder: Path, name: str) -> Mapping[str, Any]:
    """The text model's transformers configuration: the folder's, the shipped one, else the hub cache's.

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
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The text model {name!r} is unknown here: {own} does not describe it, it is none of "
            f"{sorted(TEXT_CONFIGS)}, and the local hub cache has no copy. Put its config.json into {folder}."
        ) from error
    return found


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as open_clip has them: wrappers' prefixes and obsolete buffers dropped."""
    for prefix in _PREFIXES:
        if any(name.startswith(f"{prefix}visual.") for name in state):
            state = without_prefix(state, prefix)
            break
    return {name: tensor for name, tensor in state.items() if name != _POSITION_IDS}


def _load(model: nn.Module, state: dict[str, Tensor], origin: Path) -> None:
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # scalar or (1,), and absent from some: neither is embedded
        if name in wanted:
            state[name] = state.get(name, wanted[name]).reshape(wanted[name].shape)
        else:
            state.pop(name, None)
    load_strictly(model, state, origin=origin)


def _config_of_folder(folder: Path, architecture: str | None) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    if architecture is not None and not path.is_file():
        return {"model_cfg": architecture_config(architecture)}
    config = config_from_file(path)
    model_config = config.get("model_cfg")
    if (
        not isinstance(model_config, dict)
        or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys()
    ):
        raise CheckpointError(f"{path} describes no model: 'model_cfg' with its towers is missing.")
    if "hf_model_name" not in model_config["text_cfg"]:
        raise CheckpointError(
            f"{path} describes an open_clip model whose text tower is not a Hugging Face encoder. "
            "Only NLLB (m2m_100) and XLM-R text towers are supported."
        )
    return config


def _with_own_trunk(model_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Point timm's ``local-dir:`` at the checkpoint's own folder, wherever the command is run from."""
    vision = model_config["vision_cfg"]
    name = str(vision.get("timm_model_name", ""))
    own = folder / Path(name.removeprefix("local-dir:")).name
    if name.startswith("local-dir:") and (own / "config.json").is_file():
        vision = {**vision, "timm_model_name": f"local-dir:{own}"}
    return {**model_config, "vision_cfg": vision}


def _name_of_architecture(model_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> str:
    """open_clip's name where it has one, else the towers' widths and depths."""
    import open_clip

    parts = ("embed_dim", "vision_cfg", "text_cfg")
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)
        if all(known.get(part) == model_config.get(part) for part in parts):
            return str(name)
    vision = model_config["vision_cfg"]
    width = text_config.get("d_model") or text_config.get("hidden_size")
    n_layers = text_config.get("encoder_layers") or text_config.get("num_hidden_layers")
    if timm_name := str(vision.get("timm_model_name", "")):
        image = timm_name.rpartition("/")[2]
    else:
        image = f"ViT {vision['width']}x{vision['layers']}/{vision['patch_size']}"
    return f"{text_config['model_type']} {width}x{n_layers} + {image}"


@contextmanager
def _folder_of_config(config: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        yield os.fspath(folder)
