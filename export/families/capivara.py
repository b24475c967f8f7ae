"""CAPIVARA (arXiv 2310.13683): open_clip's XLM-R base + ViT-B/32, tuned for Portuguese.

Forms: an open_clip folder; the project's Lightning checkpoint (``*.ckpt``, names under ``model.model.``);
a LoRA adapter folder on either, merged into the text tower and checked against the unmerged model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from export.families.family import Family, LoadOptions
from export.families.open_clip_towers import towers_from_open_clip
from export.open_clip_checkpoint import (
    WEIGHT_FILES,
    OpenClipCheckpoint,
    checkpoint_from_folder,
    find_weights,
    text_config_of,
)
from export.published import LICENCES
from export.towers import Towers
from export.weights import config_from_file
from runtime.errors import CheckpointError

__all__ = ["FAMILY"]

ARCHITECTURE = "xlm-roberta-base-ViT-B-32"
_PUBLISHED_BASE = "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"


def claims(path: Path) -> bool:
    """An open_clip folder around XLM-R, bare CAPIVARA weights, a Lightning checkpoint, or an adapter."""
    if path.suffix == ".ckpt" or (path / "adapter_config.json").is_file():
        return True
    if (path / "open_clip_config.json").is_file():
        text = config_from_file(path / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
        name = text.get("hf_model_name")
        return bool(name) and text_config_of(path, str(name)).get("model_type") == "xlm-roberta"
    return not (path / "config.json").is_file() and bool(_weights(path))


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers; an adapter is merged into its base's text tower.

    Raises:
        CheckpointError: see ``checkpoint_from_folder``; or an adapter without a base, or one that does
            not give the same vectors merged and unmerged.
    """
    if (path / "adapter_config.json").is_file():
        return _load_adapter(path, options)
    checkpoint = _checkpoint(path)
    return towers_from_open_clip(
        checkpoint,
        family="capivara",
        context_length=options.context_length,
        source={"weights": checkpoint.weights.name},
    )


def _checkpoint(path: Path) -> OpenClipCheckpoint:
    weights = _weights(path) or find_weights(path)
    return checkpoint_from_folder(weights.parent, architecture=ARCHITECTURE, weights=weights)


def _weights(path: Path) -> Path | None:
    """An open_clip weight file, else the project's own Lightning checkpoint."""
    if path.suffix == ".ckpt":
        return path
    named = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    return next(iter((*named, *sorted(path.glob("*.ckpt")))), None)


def _load_adapter(path: Path, options: LoadOptions) -> Towers:
    base = _base_of_adapter(path, options)
    checkpoint = _checkpoint(base)
    unmerged = _with_adapter(checkpoint.model.text, path)
    merged = _merged(unmerged)
    _check_merge(unmerged, merged, checkpoint)
    return towers_from_open_clip(
        checkpoint,
        family="capivara",
        text=merged,
        reference_text=unmerged,
        context_length=options.context_length,
        source={"weights": checkpoint.weights.name, "adapter": path.name, "base": base.name},
    )


def _base_of_adapter(path: Path, options: LoadOptions) -> Path:
    if options.base is not None:
        return options.base
    named = config_from_file(path / "adapter_config.json").get("base_model_name_or_path")
    if named and (path / str(named)).is_dir():
        return (path / str(named)).resolve()
    raise CheckpointError(
        f"{path} is a LoRA adapter whose base is not at hand (it names {named!r}). "
        f"Pass --base FOLDER with the open_clip checkpoint below it; the published one is {_PUBLISHED_BASE}."
    )


def _with_adapter(text: nn.Module, path: Path) -> Any:
    import peft

    try:
        return peft.PeftModel.from_pretrained(text, str(path)).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter in {path} does not fit its base: {str(error).strip().splitlines()[0]}. "
            "Pass the base it was trained on with --base FOLDER, or copy the adapter again."
        ) from error


def _merged(unmerged: Any) -> Any:
    """Merge in float64 and round once: the same weights on every processor."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(unmerged)
    for layer in (module for module in merged.modules() if isinstance(module, BaseTunerLayer)):
        layer.double()
    return merged.merge_and_unload().float().eval()


@torch.inference_mode()
def _check_merge(unmerged: Any, merged: Any, checkpoint: OpenClipCheckpoint) -> None:
    pad = int(checkpoint.text_config["pad_token_id"])
    ids = torch.randint(
        4, int(checkpoint.text_config["vocab_size"]), (4, 12), generator=torch.Generator().manual_seed(0)
    )
    ids[2:, 7:] = pad
    before, after = unmerged(ids), merged(ids)
    error = float((before - after).abs().max() / before.abs().max())
    if not error <= 1e-5:
        raise CheckpointError(
            f"Merging the adapter changed its text vectors by {error:.2e} of their size (limit 1e-5). "
            "The adapter uses an option that merging does not cover."
        )


FAMILY = Family(
    name="capivara",
    claims=claims,
    load=load,
    licence=LICENCES["capivara"],
    forms="open_clip folder whose text model is XLM-R; Lightning *.ckpt; LoRA adapter folder (peft)",
)
