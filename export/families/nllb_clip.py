"""NLLB-CLIP (arXiv 2309.01859): open_clip towers, NLLB text encoder, 201 languages, optional MRL heads.

Forms: an open_clip folder; the same with MRL heads in a second weight file; the published MRL folder
(``config.json`` with ``clip_model_name``, weights under ``model.`` and ``matryoshka_layer.layers.``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from export.families.family import Family, LoadOptions
from export.families.open_clip_towers import towers_from_open_clip
from export.open_clip_checkpoint import WEIGHT_FILES, checkpoint_from_folder, text_config_of
from export.published import LICENCES
from export.towers import Towers
from export.weights import config_from_file, state_dict_from_file, without_prefix
from runtime.errors import CheckpointError

__all__ = ["FAMILY"]

_MRL_FILES = ("model.safetensors", "pytorch_model.bin")
_MRL_PREFIX = "matryoshka_layer.layers."


def claims(path: Path) -> bool:
    """An open_clip folder around an M2M100 encoder, or a published MRL folder."""
    if (path / "open_clip_config.json").is_file():
        text = config_from_file(path / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
        name = text.get("hf_model_name")
        return bool(name) and text_config_of(path, str(name)).get("model_type") == "m2m_100"
    return "mrl_resolutions" in _mrl_config(path)


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers and, where there are any, the MRL heads.

    Raises:
        CheckpointError: see ``checkpoint_from_folder``; or heads that do not fit ``mrl_resolutions``.
    """
    mrl = _mrl_config(path)
    heads_file = next((path / name for name in _MRL_FILES if (path / name).is_file()), None)
    own_weights = any((path / name).is_file() for name in WEIGHT_FILES)
    checkpoint = checkpoint_from_folder(
        path,
        architecture=mrl.get("clip_model_name"),
        weights=None if own_weights else heads_file,
    )
    preprocess = {**checkpoint.preprocess_config, **(mrl.get("preprocess_cfg") or {})}
    if mrl and not preprocess:
        raise CheckpointError(
            f"{path / 'config.json'} has no preprocess_cfg, and no open_clip_config.json has."
        )
    heads = {}
    if mrl:
        if heads_file is None:
            raise CheckpointError(
                f"{path} names MRL widths {mrl['mrl_resolutions']}, but none of {list(_MRL_FILES)} is there "
                "to hold the heads. Copy the checkpoint folder again, whole."
            )
        heads = _heads(
            state_dict_from_file(heads_file), mrl, int(checkpoint.model_config["embed_dim"]), heads_file
        )
    return towers_from_open_clip(
        dataclasses.replace(checkpoint, preprocess_config=preprocess),
        family="nllb-clip",
        heads=heads,
        context_length=options.context_length,
        source={"weights": checkpoint.weights.name},
    )


def _mrl_config(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    found = config_from_file(config) if config.is_file() else {}
    return found if "mrl_resolutions" in found else {}


def _heads(state: dict[str, Tensor], config: dict[str, Any], dim: int, origin: Path) -> dict[int, nn.Linear]:
    tensors = without_prefix(state, _MRL_PREFIX)
    heads = {}
    for width in (int(r) for r in config["mrl_resolutions"]):
        weight, bias = tensors.get(f"{width}.weight"), tensors.get(f"{width}.bias")
        if weight is None or bias is None or weight.shape != (width, dim) or bias.shape != (width,):
            found = None if weight is None else tuple(weight.shape)
            raise CheckpointError(
                f"{origin} holds no MRL head of width {width} on {dim} (weight of shape {found}; "
                f"expected {(width, dim)} and a bias). It does not belong to this config.json."
            )
        head = nn.Linear(dim, width, device="meta")
        head.weight, head.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        heads[width] = head.requires_grad_(False)
    return heads


FAMILY = Family(
    name="nllb-clip",
    claims=claims,
    load=load,
    licence=LICENCES["nllb-clip"],
    forms="open_clip folder whose text model is NLLB (m2m_100), with or without MRL heads",
)
