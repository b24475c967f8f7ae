"""Tokenizers and image processors of transformers folders, shared by several families."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from export.families.tokenizers import TOKENIZER_FILES, complete_tokenizer, has_tokenizer, tokenizer_errors
from export.weights.tensors import in_one_line
from runtime.errors import CheckpointError
from runtime.manifest import ImagePreprocessing, triple

__all__ = [
    "PROCESSOR_FILES",
    "image_preprocessing_of",
    "image_processor_of",
    "squashing_of",
    "tokenizer_of",
]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Names of an image processor's configuration; transformers 5 writes the second, nested."""

_PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def tokenizer_of(folder: Path, kind: str, *, published: str | None = None, **options: Any) -> Any:
    """Load the folder's tokenizer, as class ``kind`` if its files name no class.

    ``published`` is the hub name of the authors' tokenizer, read from the local cache if the folder has none.

    Raises:
        CheckpointError: no tokenizer is found, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder) and published is None:  # transformers would make an empty one up
        raise CheckpointError(
            f"{folder} has no usable tokenizer: none of {list(TOKENIZER_FILES)} is there. "
            "Copy the checkpoint folder again, whole."
        )
    origin = str(folder) if has_tokenizer(folder) else str(published)
    with tokenizer_errors(origin, folder), complete_tokenizer(origin, kind) as source:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, **options)


def image_processor_of(folder: Path, kind: str = "CLIPImageProcessor") -> Any:
    """Load the folder's image processor of a ``kind``; omitted fields take transformers' defaults.

    Raises:
        CheckpointError: it is missing, transformers cannot read it, or it is of another kind.
    """
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise CheckpointError(
            f"{folder} has no image preprocessing: none of {list(PROCESSOR_FILES)} is there. "
            "Copy the checkpoint folder again, whole."
        )
    try:
        # PIL's resize is what the checkpoints were trained with; torchvision's differs in the last bit.
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"{folder} has no usable {' or '.join(PROCESSOR_FILES)} ({type(error).__name__}: "
            f"{in_one_line(error)}). Copy the checkpoint folder again, whole."
        ) from error
    if type(processor).__name__.removesuffix("Pil") != kind:
        raise CheckpointError(
            f"{folder} names a {type(processor).__name__}; this family's is a {kind}, and no other is "
            "supported."
        )
    return processor


def image_preprocessing_of(processor: Any, folder: Path) -> ImagePreprocessing:
    """Convert a CLIP image processor, as transformers reads it, to image preprocessing settings.

    Raises:
        CheckpointError: a step is not CLIP's (resize of the shortest side to the crop's size, centre crop,
            RGB, normalise), or a value is not a number.
    """
    size, crop = processor.size, processor.crop_size
    side, height, width = (_of(size, "shortest_edge"), _of(crop, "height"), _of(crop, "width"))
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    off = [step for step in steps if not getattr(processor, step, True)]
    resample = getattr(processor, "resample", 3)
    factor = getattr(processor, "rescale_factor", 1 / 255)
    usual = (
        not off
        and type(side) is int
        and side == height == width
        and side > 0
        and resample in _PIL_RESAMPLING
        and _is_scale(factor)
        and _are_channels(processor.image_mean)
        and _are_channels(processor.image_std)
        and all(float(value) > 0 for value in processor.image_std)
    )
    if not usual:
        raise CheckpointError(
            f"{folder} has a preprocessing that is not CLIP's (resize of the shortest side to the "
            "crop's size, centre crop, RGB, division by 255, normalise): "
            f"shortest side {side!r}, crop {height!r} x {width!r}, resample {resample!r}, rescale_factor "
            f"{factor!r}, image_mean {processor.image_mean!r}, image_std {processor.image_std!r}, off {off}."
        )
    return ImagePreprocessing(
        height=int(height),
        width=int(width),
        resize="shortest",
        interpolation=_PIL_RESAMPLING[int(resample)],
        order="convert-resize",
        crop_rounding="floor",
        mean=triple(processor.image_mean),
        std=triple(processor.image_std),
    )


def squashing_of(processor: Any, folder: Path) -> ImagePreprocessing:
    """Convert an image processor that resizes both sides, as SigLIP's, to image preprocessing settings.

    Raises:
        CheckpointError: it does anything but resize both sides and normalise, or a value is not a number.
    """
    height, width = _sides(processor.size)
    off = [step for step in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, step, True)]
    resample = getattr(processor, "resample", 2)
    usual = (
        not off
        and all(type(side) is int and side > 0 for side in (height, width))
        and (
            not getattr(processor, "do_center_crop", False) or _sides(processor.crop_size) == (height, width)
        )
        and resample in _PIL_RESAMPLING
        and _is_scale(getattr(processor, "rescale_factor", 1 / 255))
        and _are_channels(processor.image_mean)
        and _are_channels(processor.image_std)
        and all(float(value) > 0 for value in processor.image_std)
    )
    if not usual:
        raise CheckpointError(
            f"{folder} has a preprocessing that is not SigLIP's (resize of both sides, division by 255, "
            f"normalise): size {processor.size!r}, resample {resample!r}, image_mean "
            f"{processor.image_mean!r}, image_std {processor.image_std!r}, off {off}."
        )
    return ImagePreprocessing(
        height=int(height),
        width=int(width),
        resize="squash",
        interpolation=_PIL_RESAMPLING[int(resample)],
        order="convert-resize",
        crop_rounding="floor",
        mean=triple(processor.image_mean),
        std=triple(processor.image_std),
    )


def _sides(size: Any) -> tuple[Any, Any]:
    return _of(size, "height"), _of(size, "width")


def _is_scale(factor: object) -> bool:
    return isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)


def _of(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def _are_channels(values: Any) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
