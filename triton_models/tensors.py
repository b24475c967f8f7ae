"""Conversion of a request's tensors to typed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = ["bytes_rows", "one_width", "text_rows"]


def bytes_rows(tensor: NDArray[Any], name: str) -> list[bytes]:
    """Convert a BYTES tensor (rows, 1) to bytes.

    Raises:
        InputError: the shape is wrong.
    """
    shape = tensor.shape
    if len(shape) != 2 or shape[1] != 1 or not shape[0]:
        raise InputError(f"Input {name!r} has shape {list(shape)}; expected [rows, 1].")
    values = tensor[:, 0].tolist()
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


def text_rows(tensor: NDArray[Any], name: str, *, max_bytes: int, max_characters: int) -> list[str]:
    """Convert a BYTES tensor (rows, 1) to text.

    Raises:
        InputError: the shape is wrong, bytes are not UTF-8, or a text is over a limit.
    """
    texts = []
    for i, row in enumerate(bytes_rows(tensor, name)):
        if len(row) > max_bytes:
            raise InputError(f"{name} {i} has {len(row)} bytes; the limit is {max_bytes}. Shorten it first.")
        try:
            text = row.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} {i} is not UTF-8: {error.reason} at byte {error.start} of {len(row)}. "
                "Encode it as UTF-8."
            ) from None
        if len(text) > max_characters:
            raise InputError(
                f"{name} {i} has {len(text)} characters; the limit is {max_characters}. Shorten it first."
            )
        texts.append(text)
    return texts


def one_width(tensor: NDArray[Any] | None) -> int | None:
    """Return the width that a request asks for, which must be the same for all its rows.

    Raises:
        InputError: the rows ask for different widths.
    """
    if tensor is None:
        return None
    widths = sorted({int(width) for width in np.asarray(tensor).ravel()})
    if len(widths) != 1:
        raise InputError(f"Input 'dim' has widths {widths} in one request; send one request per width.")
    return widths[0]
