"""Load CLIP-like models of transformers folders: ``text_model``, ``vision_model`` and their projections."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.weights.tensors import (
    in_one_line,
    names_in_short,
    state_dict_from_file,
    without_still_buffers,
    without_wrappers,
)
from runtime.errors import CheckpointError

__all__ = ["WEIGHT_FILES", "model_from_folder"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of a transformers folder's weight files, in order of preference."""

_SCORES_ONLY = ("logit_scale", "logit_bias")
"""Weights that scale or shift scores, and move no vector."""


def model_from_folder(
    folder: Path, weights: Path, *, config_kind: str, model_kind: str, unused: tuple[str, ...] = ()
) -> Any:
    """Build transformers' own model in FP32 with eager attention, and load its weights strictly.

    Args:
        config_kind: Name of the configuration's class in transformers.
        model_kind: Name of the model's class in transformers.
        unused: Prefixes of tensors that are stored but do not affect embeddings.

    Raises:
        CheckpointError: transformers cannot read the folder, or the weights do not match the architecture.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    state = _state(weights, unused)
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)  # its report of faults is repeated below as an error
    transformers_logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, model_kind).from_pretrained(
            None,
            config=getattr(transformers, config_kind).from_pretrained(str(folder), local_files_only=True),
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"transformers cannot load {folder}: "
            f"{in_one_line(error)}. Its config.json or "
            "weights are damaged, or from another transformers version."
        ) from error
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
    _check_loading(info, weights)
    return model.eval().requires_grad_(False)


def _state(weights: Path, unused: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the weights without the tensors that do not affect embeddings; all others must load."""
    state = without_wrappers(state_dict_from_file(weights), "vision_model.", origin=weights)
    state = without_still_buffers(state, nn.Module(), origin=weights)
    integers = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(
            f"{weights} stores {names_in_short(integers)} as integers, which need a scale to be read. "
            "Save the weights in FP32 or FP16."
        )
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def _check_loading(info: Mapping[str, Any], weights: Path) -> None:
    faults = [f"{name} is missing" for name in info["missing_keys"] if name not in _SCORES_ONLY]
    faults += [f"{name} is unexpected" for name in info["unexpected_keys"]]
    faults += [f"{fault} has another shape" for fault in info["mismatched_keys"]]
    faults += [str(message) for message in info["error_msgs"]]
    if faults:
        raise CheckpointError(
            f"{weights} does not match its architecture: {names_in_short(faults, '; ')}; {len(faults)} "
            "faults in total. The config.json beside it belongs to another checkpoint, or the file to "
            "another model."
        )
