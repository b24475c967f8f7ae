"""What is kept beside an index: what it holds, how it was built, and how well it was measured to search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.embeddings import Encoding
from runtime.errors import InputError, ManifestError
from runtime.indexes.plan import Kind
from runtime.indexes.space import Space
from runtime.typed_json import OPTIONAL, value_from_json

__all__ = ["IDS_FILE", "INDEX_FILE", "RECORD_FILE", "VERSION", "IndexRecall", "IndexRecord", "OperatingPoint"]

RECORD_FILE = "index.json"
INDEX_FILE = "index.faiss"
IDS_FILE = "ids.arrow"

VERSION = 1


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What one effort finds, and how long that takes.

    Attributes:
        effort: See ``Settings.effort``; 0 for a flat index, whose search has no choice.
        recall: Share of the true ``k`` nearest that was found, 0..1; a row that scores as well as the k-th is
            one of them.
        search_ms: Median time of a query asked alone.
        queries_per_second: Of all queries asked at once.
    """

    effort: int
    recall: float
    search_ms: float
    queries_per_second: float


@dataclass(frozen=True, slots=True)
class IndexRecall:
    """How an index compares with exact search.

    Attributes:
        k: Neighbours asked for: 10, or fewer where the index is smaller.
        n_queries: Queries; 0 where the index has too few rows to hold any out.
        queries: Where they came from: ``held-out rows``, or a folder of vectors.
        threads: Threads of the search.
        points: By rising effort.
    """

    k: int
    n_queries: int
    queries: str
    threads: int
    points: tuple[OperatingPoint, ...]


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """Description of an index folder, its ``index.json``.

    Attributes:
        version: Of this layout.
        kind: A ``Kind``.
        parameters: Settings of the kind, all decided.
        effort: What searches use unless they say otherwise; 0 for a flat index.
        n_rows: Vectors.
        n_well_trained_rows: Training rows that FAISS asks for, to compare with
            ``parameters["n_training_rows"]``; 0 where nothing is trained.
        fingerprint: Embedding space of the vectors.
        dim: Components of a vector.
        encoding: An ``Encoding``: how the vectors were stored that the index was built from.
        model: Name of the model that embedded them.
        modality: ``text`` or ``image``.
        source: What was embedded, as it was called then; empty where that is not recorded.
        file_bytes: Size of each file.
        recall: Measured before the index was published.
        seconds: Time of each step.
        seed: Of everything drawn by chance.
        faiss: Version of FAISS.
        created: UTC, ISO 8601.
        computations: What computed the vectors, as the journals of their folder say.
    """

    version: int
    kind: str
    parameters: Mapping[str, Any]
    effort: int
    n_rows: int
    n_well_trained_rows: int
    fingerprint: str
    dim: int
    encoding: str
    model: str
    modality: str
    source: str
    file_bytes: Mapping[str, int]
    recall: IndexRecall
    seconds: Mapping[str, float]
    seed: int
    faiss: str
    created: str
    computations: tuple[Mapping[str, Any], ...] = field(default=(), metadata={OPTIONAL: True})

    @property
    def space(self) -> Space:
        """What queries have to fit."""
        return Space(self.fingerprint, self.dim, Encoding(self.encoding))

    @property
    def size_bytes(self) -> int:
        """Size on disk, without this record."""
        return sum(self.file_bytes.values())

    @property
    def point(self) -> OperatingPoint | None:
        """What was measured at the effort of the index; ``None`` where nothing was."""
        return next((point for point in self.recall.points if point.effort == self.effort), None)

    def write(self, folder: Path) -> None:
        """Write it into an index's folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> IndexRecord:
        """Read an index's record, and see that its files are whole.

        Raises:
            InputError: the folder holds no index, or one that is damaged or of another version.
        """
        path = folder / RECORD_FILE
        try:
            decoded = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder} holds no index: there is no {RECORD_FILE}. Build one with babeltower index."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}). Build the index again.") from error
        if isinstance(decoded, dict) and decoded.get("version") != VERSION:
            raise InputError(
                f"{path} is of version {decoded.get('version')!r}; this build reads {VERSION}. "
                "Build the index again."
            )
        try:
            record: IndexRecord = value_from_json(cls, decoded, str(path))
            Kind(record.kind), Encoding(record.encoding)
        except (ManifestError, ValueError) as error:
            raise InputError(f"{path} is no record of an index ({error}). Build the index again.") from error
        record._require_whole(folder)
        return record

    def _require_whole(self, folder: Path) -> None:
        for name, expected in self.file_bytes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != expected:
                raise InputError(
                    f"{folder / name} has {found if found is not None else 'no'} bytes, {RECORD_FILE} says "
                    f"{expected}. The index was cut short or mixed with another: build it again."
                )
