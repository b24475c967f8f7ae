"""Tensors as they lie on the wire (KServe v2, binary): numbers as they are, a length before each string."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["SharedTensor", "Tensor", "bytes_from_strings", "bytes_from_tensor", "datatype_of"]


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A BYTES input that lies in a shared memory region which the server knows."""

    region: str
    size_bytes: int
    shape: tuple[int, ...]


Tensor: TypeAlias = NDArray[Any] | SharedTensor
"""int32, or an object array of ``bytes``, which is a BYTES tensor."""


def datatype_of(tensor: Tensor) -> str:
    """Its name in the protocol."""
    is_bytes = isinstance(tensor, SharedTensor) or tensor.dtype == np.object_
    return "BYTES" if is_bytes else "INT32"


def bytes_from_tensor(tensor: NDArray[Any]) -> bytes:
    """Contents of an int32 or a BYTES tensor."""
    if tensor.dtype == np.object_:
        return bytes_from_strings(tensor.ravel().tolist())
    return np.ascontiguousarray(tensor, dtype="<i4").tobytes()


def bytes_from_strings(strings: Sequence[bytes]) -> bytes:
    """Four bytes of length before each."""
    return b"".join(piece for string in strings for piece in (struct.pack("<I", len(string)), string))
