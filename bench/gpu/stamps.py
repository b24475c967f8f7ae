"""Stamps of kept exports: what is reused was made by the same sources, whatever commit is named beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.models.samples import ROOT
from bench.records.record import artefact_sha256

__all__ = ["ExportStamp"]

_SOURCES = (
    "export/**/*.py",
    "runtime/manifest.py",
    "bench/models/full_size.py",
    "bench/models/gemma_tokenizer.py",
    "bench/models/speed_artefacts.py",
)


@dataclass(frozen=True, slots=True)
class ExportStamp:
    """File that holds the hash of all that shapes an export, and that hash as it is now."""

    file: Path
    sha256: str

    @classmethod
    def of(cls, file: Path, *inputs: Path) -> ExportStamp:
        """Return a stamp of the sources that export, and of further inputs: a checkpoint's files."""
        sources = (path for pattern in _SOURCES for path in sorted(ROOT.glob(pattern)))
        return cls(file, artefact_sha256(*sources, *inputs))

    @property
    def is_current(self) -> bool:
        """Whether the kept export was made of the same."""
        return self.file.is_file() and self.file.read_text(encoding="ascii") == self.sha256

    def write(self) -> None:
        """Write the hash, after the export is complete."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.sha256, encoding="ascii")
