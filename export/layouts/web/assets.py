"""Files of the page, in parts that every static host takes, with the checksums that the page compares.

Files that become much smaller are compressed here, since not every host does so, and unpacked by the page.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import ExportError

__all__ = ["PART_BYTES", "Asset", "write_asset", "write_joined"]

PART_BYTES = 20_000_000
"""Largest file: hosts of static pages take files of 25 to 100 MB."""

_WORTH_COMPRESSING = 0.8

_COMPRESSED = ".bin"
"""Suffix of compressed files: one that hosts do not know, so that none unpacks them on their way."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file; ``path`` is relative to the page's folder, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Asset:
    """Bytes that the page loads: the parts joined, and unpacked if they are compressed.

    Attributes:
        bytes: Number of bytes of all parts.
    """

    parts: tuple[Part, ...]
    compressed: bool = False

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for ``site.json``."""
        return {
            "bytes": self.bytes,
            "compressed": self.compressed,
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }


def write_asset(folder: Path, path: str, data: bytes | BinaryIO, *, part_bytes: int = PART_BYTES) -> Asset:
    """Write bytes to ``path``, or to ``path.000``, ``path.001`` and so on if they exceed a part.

    Args:
        folder: Folder of the page.
        data: The bytes; or a file opened for reading them, which is not compressed.
    """
    compressed = False
    if isinstance(data, bytes):
        packed = gzip.compress(data, mtime=0)
        compressed = len(packed) < _WORTH_COMPRESSING * len(data)
        path = f"{path}{_COMPRESSED}" if compressed else path
    stream = data if not isinstance(data, bytes) else io.BytesIO(packed if compressed else data)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    following = stream.read(part_bytes)
    while following or not parts:
        chunk, following = following, stream.read(part_bytes)
        name = f"{path}.{len(parts):03d}" if parts or following else path
        (folder / name).write_bytes(chunk)
        parts.append(Part(name, len(chunk), hashlib.sha256(chunk).hexdigest()))
    return Asset(tuple(parts), compressed)


def write_joined(folder: Path, asset: Mapping[str, Any], target: Path) -> None:
    """Join the parts of an asset of ``site.json`` to one file, and unpack it, as the page does.

    Raises:
        ExportError: a part differs from its checksum.
    """
    parts: Sequence[Mapping[str, Any]] = asset["parts"]
    with tempfile.TemporaryFile() as joined:
        for part in parts:
            data = (folder / part["path"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise ExportError(f"{folder / part['path']} was changed while it was exported. Export again.")
            joined.write(data)
        joined.seek(0)
        with target.open("wb") as unpacked:
            stream: Any = gzip.GzipFile(fileobj=joined) if asset["compressed"] else joined
            shutil.copyfileobj(stream, unpacked)
