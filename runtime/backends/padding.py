"""Pad a batch to one of the few shapes that a GPU runs; see ``runtime/preprocessing/buckets.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.plans import Profile
from runtime.preprocessing.buckets import Buckets, image_buckets, text_buckets

__all__ = ["buckets_of_profile", "padded_to_bucket"]

_IDS, _MASK = "input_ids", "attention_mask"


def padded_to_bucket(
    inputs: Mapping[str, NDArray[Any]], buckets: Buckets
) -> tuple[dict[str, NDArray[Any]], int]:
    """Pad a tower's inputs with zeros to the smallest bucket that holds them, or not if they run as they are.

    An added row of a text tower attends to its first token, since attention over nothing is not a number.
    Inputs that already have a bucket's shape are returned as they are.

    Args:
        inputs: ``input_ids`` (rows, tokens) and for most towers ``attention_mask``, or ``pixels`` (rows, 3,
            height, width).

    Returns:
        The padded inputs, and the number of their rows that are the caller's, the first ones.

    Raises:
        InputError: the batch is larger than every bucket.
    """
    n_rows = len(next(iter(inputs.values())))
    is_text = _IDS in inputs and buckets.lengths != (1,)  # with one length alone, only rows are padded
    if is_text and buckets.is_exact(n_rows, inputs[_IDS].shape[1]):
        return dict(inputs), n_rows
    rows, length = buckets.shape_of(n_rows, inputs[_IDS].shape[1] if is_text else 1)
    padded = {}
    for name, array in inputs.items():
        shape = (rows, length) if is_text else (rows, *array.shape[1:])
        if array.shape == shape:
            padded[name] = array
            continue
        padded[name] = np.zeros(shape, array.dtype)
        padded[name][tuple(slice(size) for size in array.shape)] = array
        if name == _MASK:
            padded[name][n_rows:, 0] = 1
    return padded, n_rows


def buckets_of_profile(profile: Profile) -> Buckets:
    """Return the shapes that are run in a TensorRT profile, up to its largest."""
    largest = profile.largest
    rows, tokens = largest["batch"], largest.get("sequence")
    if tokens is None:
        return image_buckets(max_rows=rows)
    return text_buckets(tokens, max_rows=rows, max_tokens=rows * tokens)
