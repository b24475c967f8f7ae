"""Stored embeddings: float32, float16, int8 or one bit per component, and their similarities."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import unit_rows
from runtime.errors import InputError

__all__ = [
    "Encoding",
    "bits_from_float",
    "cosine_similarity",
    "encoded_from_float",
    "float_from_encoded",
    "float_from_int8",
    "hamming_distance",
    "int8_from_float",
]

INT8_SCALE = 127
"""Stored int8 value of a component of 1.0."""


class Encoding(str, Enum):
    """Storage format of vectors."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    BINARY = "binary"


def encoded_from_float(vectors: NDArray[np.float32], encoding: Encoding | str) -> NDArray[Any]:
    """Encode unit vectors for storage.

    Args:
        vectors: float32 (n, dim), L2-normalised.

    Returns:
        float32, float16 or int8 (n, dim), or for ``binary`` uint8 (n, ceil(dim / 8)).

    Raises:
        InputError: the encoding is unknown.
    """
    match _encoding(encoding):
        case Encoding.FLOAT32:
            return vectors
        case Encoding.FLOAT16:
            return vectors.astype(np.float16)
        case Encoding.INT8:
            return int8_from_float(vectors)
        case Encoding.BINARY:
            return bits_from_float(vectors)


def _encoding(encoding: Encoding | str) -> Encoding:
    try:
        return Encoding(encoding)
    except ValueError:
        raise InputError(
            f"Encoding {encoding!r} is unknown; expected one of {[e.value for e in Encoding]}."
        ) from None


def int8_from_float(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Quantize to int8: ``clip(round(127 · x), -127, 127)``, half to even, with one fixed symmetric scale.

    The scale is the same for every vector, so dot products of int8 vectors keep the order of the cosines
    up to rounding; ``float_from_int8`` reverses the scale.

    Args:
        vectors: float32 (n, dim), L2-normalised.

    Returns:
        int8 (n, dim).
    """
    return np.clip(np.rint(vectors * INT8_SCALE), -INT8_SCALE, INT8_SCALE).astype(np.int8)


def float_from_int8(vectors: NDArray[np.int8]) -> NDArray[np.float32]:
    """Dequantize int8 vectors, ``x / 127``: float32 (n, dim), of nearly unit length."""
    return vectors.astype(np.float32) / np.float32(INT8_SCALE)


def float_from_encoded(vectors: NDArray[Any], encoding: Encoding, *, dim: int) -> NDArray[np.float32]:
    """Decode stored vectors to float32.

    Args:
        vectors: Vectors as returned by ``encoded_from_float``.
        dim: Components per vector; padding bits of the last byte are dropped.

    Returns:
        float32 (n, dim), of unit length up to the encoding's rounding; for ``binary``, components of ±1, so
        that dot products are integers: ``dim - 2 · differing bits``.
    """
    if encoding is Encoding.INT8:
        return float_from_int8(vectors)
    if encoding is Encoding.BINARY:
        return 2 * np.unpackbits(vectors, axis=-1, count=dim).astype(np.float32) - 1
    return vectors.astype(np.float32, copy=False)


def bits_from_float(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pack one bit per component: 1 if above zero, the first component in the highest bit of byte 0.

    Args:
        vectors: float32 (n, dim).

    Returns:
        uint8 (n, ceil(dim / 8)); the last byte is padded with zero bits.
    """
    return np.packbits(vectors > 0, axis=-1)


def cosine_similarity(queries: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return the cosine of every query with every vector, of any norm, float32 or int8.

    Returns:
        float32 (queries, vectors), in -1..1; 0 if a vector is all zero.

    Raises:
        InputError: a component is not finite.
    """
    similarity: NDArray[np.float32] = unit_rows(queries) @ unit_rows(vectors).T
    return similarity


def hamming_distance(queries: NDArray[np.uint8], vectors: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Count the differing bits of every packed query and vector: int32 (queries, vectors)."""
    distance = np.empty((len(queries), len(vectors)), dtype=np.int32)
    for query, line in zip(queries, distance, strict=True):
        _ONES_OF_BYTE[vectors ^ query].sum(axis=-1, dtype=np.int32, out=line)
    return distance


_ONES_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=-1).sum(axis=-1, dtype=np.uint8)
