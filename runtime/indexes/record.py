"""Record stored beside an index: its content, settings and measured recall."""

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
    """Recall and speed at one search effort.

    Attributes:
        effort: See ``Settings.effort``; 0 for a flat index, which has no effort setting.
        recall: Share of the true ``k`` nearest rows found, 0..1; a row that ties with the k-th counts as
            found.
        search_ms: Median latency of single queries.
        queries_per_second: Throughput of all queries in one batch.
    """

    effort: int
    recall: float
    search_ms: float
    queries_per_second: float


@dataclass(frozen=True, slots=True)
class IndexRecall:
    """Recall of an index compared with exact search.

    Attributes:
        k: Neighbours per query: 10, or fewer if the index is smaller.
        n_queries: Number of queries; 0 if the index has too few rows to hold any out.
        queries: Origin of the queries: ``held-out rows``, or a folder of vectors.
        threads: Threads of the search.
        points: Operating points by ascending effort.
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
        version: Version of this layout.
        kind: Value of a ``Kind``.
        parameters: Complete settings of the kind.
        effort: Default search effort; 0 for a flat index.
        n_rows: Number of vectors.
        n_well_trained_rows: Training rows that FAISS recommends, to compare with
            ``parameters["n_training_rows"]``; 0 if nothing is trained.
        fingerprint: Embedding space of the vectors.
        dim: Components of a vector.
        encoding: Value of an ``Encoding``: storage format of the source vectors.
        model: Name of the model that embedded them.
        modality: ``text`` or ``image``.
        source: Source of the embedded rows, as named then; empty if not recorded.
        file_bytes: Size of each file.
        recall: Recall measured before the index was published.
        seconds: Time of each step.
        seed: Seed of random draws.
        faiss: Version of FAISS.
        created: Creation time in UTC, ISO 8601.
        computations: Computations of the vectors, from the journals of their folder.
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
        """Space that queries must match."""
        return Space(self.fingerprint, self.dim, Encoding(self.encoding))

    @property
    def size_bytes(self) -> int:
        """Size on disk, without this record."""
        return sum(self.file_bytes.values())

    @property
    def point(self) -> OperatingPoint | None:
        """Operating point at the index's default effort; ``None`` if it was not measured."""
        return next((point for point in self.recall.points if point.effort == self.effort), None)

    def write(self, folder: Path) -> None:
        """Write the record into an index's folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> IndexRecord:
        """Read an index's record, and check the sizes of its files.

        Raises:
            InputError: the folder holds no index, or the index is damaged or of another version.
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
                f"{path} has version {decoded.get('version')!r}; this babeltower reads {VERSION}. "
                "Build the index again."
            )
        try:
            record: IndexRecord = value_from_json(cls, decoded, str(path))
            Kind(record.kind), Encoding(record.encoding)
        except (ManifestError, ValueError) as error:
            raise InputError(f"{path} is not an index record ({error}). Build the index again.") from error
        record._require_whole(folder)
        return record

    def _require_whole(self, folder: Path) -> None:
        for name, expected in self.file_bytes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != expected:
                raise InputError(
                    f"{folder / name} has {found if found is not None else 'no'} bytes, {RECORD_FILE} says "
                    f"{expected}. The index is truncated or mixed with another: build it again."
                )
