"""NLLB-CLIP (arXiv 2309.01859): open_clip towers, NLLB text encoder, 201 languages, optional MRL heads.

Forms: an open_clip folder; the same with MRL heads in a second weight file; the published MRL folder
(``config.json`` with ``clip_model_name``, weights under ``model.`` and ``matryoshka_layer.layers.``); the
author's first form, a transformers folder (``nllb_clip_transformers.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.families import nllb_clip_transformers
from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.open_clip_checkpoint import checkpoint_from_folder, find_weights, text_model_type
from export.families.open_clip_towers import towers_from_open_clip
from export.families.published import LICENCES
from export.towers import Towers
from export.weights.tensors import config_from_file, names_in_short, state_dict_from_file, without_prefix
from runtime.errors import CheckpointError

__all__ = ["FAMILY"]

_MRL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MRL_PREFIX = "matryoshka_layer.layers."


def claims(path: Path) -> bool:
    """Check for an open_clip folder with an M2M100 encoder, an MRL folder, or the author's first form."""
    folder = folder_of(path)
    if (folder / "open_clip_config.json").is_file():
        return text_model_type(folder) == "m2m_100"
    return "mrl_resolutions" in _config(folder) or nllb_clip_transformers.claims(folder)


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers and the MRL heads, if any.

    Raises:
        CheckpointError: see ``checkpoint_from_folder``; or the heads do not match ``mrl_resolutions``.
    """
    folder = folder_of(path)
    if not (folder / "open_clip_config.json").is_file() and nllb_clip_transformers.claims(folder):
        return nllb_clip_transformers.load(path, options)
    mrl = _mrl_config(folder)
    weights, state, heads = _weights_and_heads(folder, file_of(path), mrl)
    architecture = mrl.get("clip_model_name") if mrl else None
    checkpoint = checkpoint_from_folder(
        folder, architecture=None if architecture is None else str(architecture), weights=weights, state=state
    )
    preprocess = {**checkpoint.preprocess_config, **(mrl.get("preprocess_cfg") or {})}
    if mrl and not preprocess:
        raise CheckpointError(
            f"No preprocess_cfg was found, neither in {folder / 'config.json'} nor in an "
            "open_clip_config.json. Copy the published config.json again."
        )
    return towers_from_open_clip(
        dataclasses.replace(checkpoint, preprocess_config=preprocess),
        family="nllb-clip",
        heads=_heads(heads, mrl, int(checkpoint.model_config["embed_dim"]), folder) if mrl else {},
        options=options,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return config_from_file(path) if path.is_file() else {}


def _mrl_config(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json`` of a folder with MRL heads; empty for other folders."""
    found = _config(folder)
    if "mrl_resolutions" not in found:
        return {}
    widths = found["mrl_resolutions"]
    if not isinstance(widths, list) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise CheckpointError(
            f"{folder / 'config.json'} has mrl_resolutions {widths!r}; expected a list of widths such as "
            "[32, 64, 128, 256, 512]."
        )
    if not isinstance(found.get("preprocess_cfg") or {}, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} has a preprocess_cfg that is not a JSON object. Copy it again."
        )
    return found


def _weights_and_heads(
    folder: Path, named: Path | None, mrl: Mapping[str, Any]
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """Return the towers' weight file, its tensors, and the heads' tensors from the same or a second file."""
    extra = next((folder / name for name in _MRL_FILES if (folder / name).is_file()), None)
    weights = named or _own_weights(folder) or extra or find_weights(folder)
    state, heads = _split(state_dict_from_file(weights))
    if extra is not None and extra != weights:
        others, more = _split(state_dict_from_file(extra))
        if mrl or more:
            _check_copy(state, others, weights, extra)
            heads = heads or more
    if heads and not mrl:
        raise CheckpointError(
            f"{folder} holds MRL heads ({names_in_short(list(heads))}), but its config.json has no "
            "mrl_resolutions. Copy the published config.json beside them; without it the heads would be lost."
        )
    if mrl and not heads:
        raise CheckpointError(
            f"{folder} names MRL widths {mrl['mrl_resolutions']}, but none of {list(_MRL_FILES)} exists "
            "and no other file holds the heads. Copy the checkpoint folder again, whole."
        )
    return weights, state, heads


def _own_weights(folder: Path) -> Path | None:
    """Return the towers' weight file, ignoring names that may hold MRL heads; None if there is none."""
    try:
        return find_weights(folder, apart_from=_MRL_FILES)
    except CheckpointError as error:
        if "holds no open_clip weights" in str(error):
            return None
        raise


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    heads = {name[name.index(_MRL_PREFIX) :]: t for name, t in state.items() if _MRL_PREFIX in name}
    return {name: tensor for name, tensor in state.items() if _MRL_PREFIX not in name}, heads


def _check_copy(state: Mapping[str, Tensor], copy: Mapping[str, Tensor], weights: Path, extra: Path) -> None:
    """Check that towers repeated in the heads' file, as in the published one, have the same values."""
    own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    for name, tensor in copy.items():
        found = own.get(name.removeprefix("model."))
        narrow = min((t.dtype for t in (tensor, found) if t is not None), key=lambda dtype: dtype.itemsize)
        if (
            found is None
            or found.shape != tensor.shape
            or not torch.equal(found.to(narrow), tensor.to(narrow))
        ):
            raise CheckpointError(
                f"{extra} holds {name}, which differs from {weights.name}: the folder holds two different "
                "models. Remove the wrong file, or copy the folder again, whole."
            )


def _heads(
    state: Mapping[str, Tensor], config: Mapping[str, Any], dim: int, origin: Path
) -> dict[int, nn.Linear]:
    tensors = without_prefix(state, _MRL_PREFIX)
    heads = {}
    for width in config["mrl_resolutions"]:
        weight, bias = tensors.pop(f"{width}.weight", None), tensors.pop(f"{width}.bias", None)
        if weight is None or bias is None or weight.shape != (width, dim) or bias.shape != (width,):
            found = None if weight is None else tuple(weight.shape)
            raise CheckpointError(
                f"{origin} has no MRL head of width {width} for dim {dim} (weight of shape {found}; "
                f"expected {(width, dim)} and a bias). The weights do not belong to this config.json."
            )
        head = nn.Linear(dim, width, device="meta")
        head.weight, head.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        heads[width] = head.requires_grad_(False)
    if tensors:
        raise CheckpointError(
            f"{origin} holds MRL heads that are not in its mrl_resolutions {config['mrl_resolutions']} "
            f"({names_in_short(list(tensors))}). The config.json belongs to another checkpoint."
        )
    return heads


FAMILY = Family(
    name="nllb-clip",
    claims=claims,
    load=load,
    licence=LICENCES["nllb-clip"],
    forms="open_clip folder whose text model is NLLB (m2m_100), with or without MRL heads; the author's "
    "first form, a transformers folder of model_type clip with an M2M100 text model",
)
