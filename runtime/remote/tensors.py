"""Binary wire format of tensors (KServe v2): raw numbers, and strings with a length prefix."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SharedTensor",
    "Tensor",
    "bytes_from_strings",
    "bytes_from_tensor",
    "datatype_of",
    "pieces_from_tensor",
]


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """BYTES input in a shared memory region registered with the server."""

    region: str
    size_bytes: int
    shape: tuple[int, ...]


Tensor: TypeAlias = NDArray[Any] | SharedTensor
"""int32 array, object array of ``bytes`` (a BYTES tensor), or shared BYTES tensor."""


def datatype_of(tensor: Tensor) -> str:
    """Return the tensor's datatype in the protocol."""
    is_bytes = isinstance(tensor, SharedTensor) or tensor.dtype == np.object_
    return "BYTES" if is_bytes else "INT32"


def bytes_from_tensor(tensor: NDArray[Any]) -> bytes:
    """Serialize an int32 or BYTES tensor."""
    return b"".join(pieces_from_tensor(tensor))


def pieces_from_tensor(tensor: NDArray[Any]) -> list[bytes]:
    """Serialize an int32 or BYTES tensor to pieces, of which strings are no copies."""
    if tensor.dtype == np.object_:
        return _pieces_from_strings(tensor.ravel().tolist())
    return [np.ascontiguousarray(tensor, dtype="<i4").tobytes()]


def bytes_from_strings(strings: Sequence[bytes]) -> bytes:
    """Serialize strings, each with a 4-byte length prefix."""
    return b"".join(_pieces_from_strings(strings))


def _pieces_from_strings(strings: Sequence[bytes]) -> list[bytes]:
    return [piece for string in strings for piece in (struct.pack("<I", len(string)), string)]
