"""Stamps of a model's files: a tower that is opened later must be the one whose checksums were verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ManifestError
from runtime.manifest import TowerFiles

__all__ = ["FileStamps"]

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class FileStamps:
    """Inode, size and time of change of files, by path; taken before their checksums are verified."""

    stamps: Mapping[Path, _Stamp]

    @classmethod
    def of_towers(cls, repository: Path, *towers: TowerFiles) -> FileStamps:
        """Take the stamps of all files of towers; missing ones are for the checksums to tell."""
        paths = [repository / record.path for tower in towers for record in tower.files]
        return cls({path: stamp for path in paths if (stamp := _stamp(path)) is not None})

    def require_unchanged(self) -> None:
        """Check that no file was replaced or changed.

        Raises:
            ManifestError: one was.
        """
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise ManifestError(
                    f"{path} was changed after the model was opened, and a part of it is opened only now. "
                    "Open the model again; a server, start again."
                )


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
