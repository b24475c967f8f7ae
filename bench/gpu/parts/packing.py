"""Pack a repository so that its precisions share their weights, and restore it byte for byte.

The samples' weights were trained to FP16 values: an FP32 graph holds each of them with thirteen zero bits, an
FP16 graph holds the same numbers, and a BF16 graph their roundings. A pack stores each tensor once, in the
narrowest type that gives it back exactly, and every file as its other bytes and a list of tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.errors import BabeltowerError
from runtime.storage import sha256_of_file

__all__ = ["pack_folder", "unpack_folder"]

_SMALL_BYTES = 1024
_TYPES = {"f4": np.dtype(np.float32), "f2": np.dtype(np.float16), "bf": np.dtype(ml_dtypes.bfloat16)}
_ONNX_TYPES = {1: "f4", 10: "f2", 16: "bf"}
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 128 << 20, "lc": 0, "lp": 2, "pb": 2}]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Tensor within a file: its offset, type and bytes."""

    file: Path
    offset: int
    dtype: str
    content: bytes

    @property
    def array(self) -> NDArray[Any]:
        """Values, in one dimension."""
        return np.frombuffer(self.content, _TYPES[self.dtype])


class _Store:
    """Distinct contents, and for each array the stored one that it can be cast from."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.dtypes: dict[str, str] = {}
        self._castable: dict[tuple[str, str], str] = {}

    def add(self, dtype: str, content: bytes) -> str:
        """Store a tensor if no stored one gives it; return the key of the stored one."""
        if (known := self._castable.get((dtype, _digest(content)))) is not None:
            return known
        array = np.frombuffer(content, _TYPES[dtype])
        if dtype == "f4":
            half = _cast(array, "f2")
            if _cast(half, "f4").tobytes() == content:
                dtype, array = "f2", half
        key = f"{dtype}-{_digest(array.tobytes())}"
        self.blobs[key], self.dtypes[key] = array.tobytes(), dtype
        for other in _TYPES:
            self._castable.setdefault((other, _digest(_cast(array, other).tobytes())), key)
        return key


def pack_folder(folder: Path, target: Path) -> None:
    """Write all files of a folder to one compressed file.

    Raises:
        BabeltowerError: a restored file would differ.
    """
    store = _Store()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    tensors = sorted(
        (tensor for path in files if path.suffix == ".onnx" for tensor in _tensors_of(path)),
        key=lambda tensor: list(_TYPES).index(tensor.dtype),  # wide ones first: others are their roundings
    )
    places: dict[Path, list[tuple[int, int, str, str]]] = {path: [] for path in files}
    seen: set[tuple[Path, int]] = set()
    for tensor in tensors:
        if (tensor.file, tensor.offset) not in seen:
            seen.add((tensor.file, tensor.offset))
            key = store.add(tensor.dtype, tensor.content)
            places[tensor.file].append((tensor.offset, len(tensor.content), tensor.dtype, key))
    index: dict[str, Any] = {"files": {}, "blobs": []}
    body = io.BytesIO()
    for key, blob in store.blobs.items():
        index["blobs"].append((key, len(blob)))
        body.write(blob)
    for path in files:
        found = sorted(places[path])
        rest = _without(path.read_bytes(), found)
        index["files"][path.relative_to(folder).as_posix()] = {
            "rest": len(rest),
            "tensors": found,
            "sha256": sha256_of_file(path),
        }
        body.write(rest)
    head = json.dumps(index).encode()
    raw = struct.pack("<Q", len(head)) + head + body.getvalue()
    target.write_bytes(lzma.compress(raw, format=lzma.FORMAT_XZ, filters=_FILTERS))


def unpack_folder(packed: Path, folder: Path) -> None:
    """Restore a packed folder.

    Raises:
        BabeltowerError: a restored file is not the one that was packed.
    """
    raw = lzma.decompress(packed.read_bytes())
    (n_head,) = struct.unpack_from("<Q", raw)
    index = json.loads(raw[8 : 8 + n_head])
    at = 8 + n_head
    blobs = {}
    for key, size in index["blobs"]:
        blobs[key] = raw[at : at + size]
        at += size
    for name, facts in index["files"].items():
        content = _restored(raw[at : at + facts["rest"]], facts["tensors"], blobs)
        at += facts["rest"]
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise BabeltowerError(f"{name} of {packed} was not restored as it was packed; pack it again.")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _restored(rest: bytes, tensors: list[tuple[int, int, str, str]], blobs: dict[str, bytes]) -> bytes:
    parts = []
    taken = at = 0
    for offset, size, dtype, key in tensors:
        gap = offset - at
        parts.append(rest[taken : taken + gap])
        taken += gap
        array = np.frombuffer(blobs[key], _TYPES[key.partition("-")[0]])
        parts.append(_cast(array, dtype).tobytes())
        at = offset + size
    parts.append(rest[taken:])
    return b"".join(parts)


def _without(content: bytes, tensors: list[tuple[int, int, str, str]]) -> bytes:
    parts = []
    at = 0
    for offset, size, *_ in tensors:
        parts.append(content[at:offset])
        at = offset + size
    parts.append(content[at:])
    return b"".join(parts)


def _tensors_of(graph: Path) -> Iterator[Tensor]:
    """Find the large float weights of a graph, within its file or its external data."""
    content = graph.read_bytes()
    model = onnx.load_from_string(content)
    at = 0
    for tensor in model.graph.initializer:
        dtype = _ONNX_TYPES.get(tensor.data_type)
        if dtype is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            path = graph.parent / facts["location"]
            offset, size = int(facts.get("offset", 0)), int(facts["length"])
            with path.open("rb") as stream:
                stream.seek(offset)
                yield Tensor(path, offset, dtype, stream.read(size))
        elif len(tensor.raw_data) >= _SMALL_BYTES:
            offset = content.find(tensor.raw_data, at)
            if offset < 0:
                offset = content.find(tensor.raw_data)
            at = offset + len(tensor.raw_data)
            yield Tensor(graph, offset, dtype, tensor.raw_data)


def _cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(_TYPES[dtype])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
