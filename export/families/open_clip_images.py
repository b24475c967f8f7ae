"""Image towers of open_clip: a model's, or the one of a folder whose text tower is not used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from export.families.family import file_of, folder_of
from export.families.open_clip_checkpoint import find_weights
from export.weights.tensors import (
    config_from_file,
    in_one_line,
    load_strictly,
    state_dict_from_file,
    without_prefix,
    without_wrappers,
)
from runtime.errors import CheckpointError
from runtime.manifest import ImagePreprocessing, triple

__all__ = ["ImageSide", "image_side_from_folder", "image_side_of_open_clip", "visual_from_config"]


@dataclass(frozen=True, slots=True)
class ImageSide:
    """Image tower of open_clip with its preprocessing, as settings and as open_clip's own transform."""

    visual: nn.Module
    preprocessing: ImagePreprocessing
    transform: Callable[[Image.Image], Tensor]


def image_side_of_open_clip(visual: Any, preprocess_config: Mapping[str, Any]) -> ImageSide:
    """Pair an image tower with the preprocessing that open_clip derives from ``preprocess_cfg``.

    Raises:
        CheckpointError: the preprocessing is not open_clip's, or not supported.
    """
    config = _preprocess_config(visual, preprocess_config)
    return ImageSide(visual, _image_preprocessing(config), _transform(config))


def image_side_from_folder(path: Path) -> tuple[ImageSide, int]:
    """Read the image tower alone of an open_clip folder, or of a weight file in one, and its output width.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not match, or the preprocessing is
            not supported.
    """
    folder = folder_of(path)
    config = config_from_file(folder / "open_clip_config.json")
    model, preprocess = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vision_cfg"), dict)
        or "embed_dim" not in model
    ):
        raise CheckpointError(
            f"{folder / 'open_clip_config.json'} does not describe an image tower: expected 'model_cfg' with "
            "embed_dim and vision_cfg."
        )
    weights = file_of(path) or find_weights(folder)
    visual = visual_from_config(model, folder)
    state = without_wrappers(state_dict_from_file(weights), "visual.", origin=weights)
    load_strictly(visual, without_prefix(state, "visual."), origin=weights)
    side = image_side_of_open_clip(visual.eval().requires_grad_(False), preprocess)
    return side, int(model["embed_dim"])


def visual_from_config(model: Mapping[str, Any], folder: Path) -> nn.Module:
    """Build the untrained image tower of a ``model_cfg`` as ``open_clip.model.CLIP`` does, in FP32.

    Raises:
        CheckpointError: open_clip or timm cannot build it.
    """
    from open_clip.model import _build_vision_tower

    vision = dict(model["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    try:
        tower: nn.Module = _build_vision_tower(
            int(model["embed_dim"]), vision, bool(model.get("quick_gelu", False))
        )
    except Exception as error:  # open_clip and timm have errors of their own
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"open_clip cannot build the image tower of {folder}: {type(error).__name__}: "
            f"{in_one_line(error)}. Its open_clip_config.json names an option that the installed open_clip "
            "and timm do not support."
        ) from error
    return tower.float()


def _preprocess_config(visual: Any, stated: Mapping[str, Any]) -> Any:
    """Merge preprocess_cfg as open_clip does: drop unknown keys, fill null ones, take the tower's size."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    try:
        # open_clip's transform takes its defaults for empty values too
        merged = merge_preprocess_dict(PreprocessCfg(), {key: value or None for key, value in stated.items()})
        return PreprocessCfg(**{**merged, "size": visual.image_size})
    except (TypeError, AssertionError) as error:
        raise _no_preprocessing(dict(stated)) from error


def _no_preprocessing(stated: object) -> CheckpointError:
    return CheckpointError(
        f"preprocess_cfg {stated} is not open_clip's; expected mean and std of three numbers, mode 'RGB', an "
        "interpolation of 'bicubic' or 'bilinear', and a resize_mode of 'shortest' or 'squash'."
    )


def _transform(config: Any) -> Any:
    from open_clip.transform import image_transform_v2

    try:
        return image_transform_v2(config, is_train=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise _no_preprocessing(config) from error


def _image_preprocessing(config: Any) -> ImagePreprocessing:
    size = config.size if isinstance(config.size, (tuple, list)) else (config.size, config.size)
    if config.resize_mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"resize_mode {config.resize_mode!r} is not supported; expected shortest or squash."
        )
    if config.interpolation not in ("bicubic", "bilinear", "random"):
        raise _no_preprocessing(config)
    return ImagePreprocessing(
        height=int(size[0]),
        width=int(size[1]),
        resize=config.resize_mode,
        # "random" is for training: open_clip resizes with bicubic otherwise
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
        order="resize-convert",
        crop_rounding="round",
        mean=_three(config.mean, config),
        std=_three(config.std, config),
    )


def _three(values: Any, config: Any) -> tuple[float, float, float]:
    """Return one value per channel, repeating a single number as open_clip does."""
    found = list(values) if isinstance(values, (list, tuple)) else [values] * 3
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in found)
    if len(found) != 3 or not numbers:
        raise _no_preprocessing(config)
    return triple(found)
