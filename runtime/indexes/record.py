"""Record stored beside an index: its content, settings and measured recall."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.embeddings import Encoding
from runtime.errors import DamagedVectorsError, InputError, ManifestError
from runtime.indexes.plan import Kind
from runtime.indexes.space import Space
from runtime.storage import replace_durably, restore_replaced, sha256_of_file
from runtime.typed_json import OPTIONAL, value_from_json

__all__ = [
    "IDS_FILE",
    "INDEX_FILE",
    "RECORD_FILE",
    "TRAINED_FILE",
    "VERSION",
    "IndexRecall",
    "IndexRecord",
    "IndexedPart",
    "OperatingPoint",
    "Segment",
]

RECORD_FILE = "index.json"
INDEX_FILE = "index.faiss"
IDS_FILE = "ids.arrow"
TRAINED_FILE = "trained.faiss"
"""Lists and codes of an ``ivf-pq`` index without rows, for the rows of an update."""

VERSION = 2
"""Version of the layout; an index of version 1 has one segment, and can be searched but not updated."""


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
class Segment:
    """Rows of an index that were added together.

    Attributes:
        index: Name of the FAISS file.
        ids: Name of the Arrow file of ids, kept columns and parts.
        n_rows: Rows of both files.
        removed: Name of the NumPy file of the numbers of removed rows; empty if there are none.
        n_removed: Number of removed rows.
    """

    index: str
    ids: str
    n_rows: int
    removed: str = field(default="", metadata={OPTIONAL: True})
    n_removed: int = field(default=0, metadata={OPTIONAL: True})


@dataclass(frozen=True, slots=True)
class IndexedPart:
    """File of vectors whose rows the index holds.

    Attributes:
        number: Value of the rows' column ``_part``.
        file: Name in the folder of vectors.
        sha256: Its SHA-256 when it was indexed.
        n_rows: Number of rows.
    """

    number: int
    file: str
    sha256: str
    n_rows: int


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
        file_sha256: SHA-256 of each file; empty in an index of version 1.
        segments: Segments, in the order in which they were added.
        parts: Files of vectors whose rows the index holds.
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
    file_sha256: Mapping[str, str] = field(default_factory=dict, metadata={OPTIONAL: True})
    segments: tuple[Segment, ...] = field(default=(), metadata={OPTIONAL: True})
    parts: tuple[IndexedPart, ...] = field(default=(), metadata={OPTIONAL: True})

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
        """Write the record into an index's folder, which makes the files that it names the index."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        replace_durably(folder / RECORD_FILE, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> IndexRecord:
        """Read an index's record, and check the sizes of its files.

        Raises:
            InputError: the folder holds no index, or the index is damaged or of another version.
        """
        restore_replaced(folder)
        path = folder / RECORD_FILE
        try:
            decoded = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder} holds no index: there is no {RECORD_FILE}. Build one with babeltower index."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}). Build the index again.") from error
        if isinstance(decoded, dict) and decoded.get("version") == 1 and "n_rows" in decoded:
            segment = {"index": INDEX_FILE, "ids": IDS_FILE, "n_rows": decoded["n_rows"]}
            decoded = {**decoded, "segments": [segment]}
        elif isinstance(decoded, dict) and decoded.get("version") != VERSION:
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
                raise DamagedVectorsError(
                    f"{folder / name} has {found if found is not None else 'no'} bytes, {RECORD_FILE} says "
                    f"{expected}. The index is truncated or mixed with another: build it again."
                )

    def require_unchanged(self, folder: Path) -> None:
        """Compare every file with its recorded checksum.

        Raises:
            DamagedVectorsError: a file was changed since it was written.
        """
        for name, expected in self.file_sha256.items():
            try:
                found = sha256_of_file(folder / name)
            except OSError as error:
                raise DamagedVectorsError(f"{folder / name} cannot be read ({error}).") from error
            if found != expected:
                raise DamagedVectorsError(
                    f"{folder / name} was changed since it was written: its SHA-256 is {found[:12]}…, "
                    f"{RECORD_FILE} says {expected[:12]}…. Build the index again, with --replace."
                )
