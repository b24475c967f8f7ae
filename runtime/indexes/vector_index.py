"""Search in an index on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import Encoder
from runtime.errors import DamagedVectorsError, InputError
from runtime.indexes import faiss_index
from runtime.indexes.conditions import Condition, hit_from_row, rows_that_meet
from runtime.indexes.exact import Hit
from runtime.indexes.folder import rows_by_number, rows_from_file
from runtime.indexes.record import IndexRecord, Segment
from runtime.indexes.space import Space, queries_from_texts

__all__ = ["VectorIndex", "allowed_rows"]


@dataclass(frozen=True, slots=True)
class _OpenSegment:
    """Opened files of a segment.

    Attributes:
        allowed: bool (rows,): rows that were not removed; ``None`` if none was.
    """

    index: Any
    rows: Any
    allowed: NDArray[np.bool_] | None


class VectorIndex:
    """Index built by ``babeltower index``; safe to search from several threads.

    The files are memory-mapped: processes that open the same index share its pages.

        with VectorIndex.open("captions.index") as index:
            found = index.search_texts(encoder, ["gato preto"], "por_Latn")
    """

    def __init__(self, location: Path, record: IndexRecord, segments: Sequence[_OpenSegment]) -> None:
        self.location = location
        self.record = record
        self._segments = tuple(segments)

    @classmethod
    def open(
        cls, location: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True
    ) -> VectorIndex:
        """Open an index's folder.

        Args:
            threads: Threads of FAISS in this process; default: unchanged.
            verify: Compare every file with its recorded checksum, which reads it once, about a gigabyte a
                second; else only sizes and numbers of rows are compared.

        Raises:
            InputError: the folder holds no index, or one of another version.
            DamagedVectorsError: a file is missing, or was changed since it was written.
            EngineError: FAISS or pyarrow is not installed.
        """
        folder = Path(location)
        record = IndexRecord.read(folder)
        if verify:
            record.require_unchanged(folder)
        faiss_index.use_threads(threads)
        segments = [_opened(folder, record, segment) for segment in record.segments]
        n_rows = sum(segment.n_rows - segment.n_removed for segment in record.segments)
        if n_rows != record.n_rows:
            raise _mixed(folder, n_rows, n_rows, record.n_rows)
        return cls(folder, record, segments)

    def __len__(self) -> int:
        return self.record.n_rows

    @property
    def space(self) -> Space:
        """Fingerprint, width and encoding of the vectors."""
        return self.record.space

    def search(
        self,
        queries: NDArray[Any],
        *,
        fingerprint: str,
        k: int = 10,
        effort: int | None = None,
        where: Sequence[Condition] = (),
    ) -> list[list[Hit]]:
        """Return the nearest rows found for every query, best first; equal scores in row order.

        Args:
            queries: float32 (queries, dim) of any norm, or in the encoding of the index.
            fingerprint: Fingerprint of the encoder that embedded the queries.
            k: Results per query; fewer if the index is smaller, or if the lists that an ``ivf-pq`` search
                visits hold fewer.
            effort: See ``Settings.effort``; default: the one chosen when the index was measured.
            where: Conditions on kept columns, all of which a row must meet; among few such rows the search is
                exact.

        Returns:
            One list per query. A score is the dot product of the unit-length query with the stored row: exact
            in ``flat`` and ``hnsw``, estimated from codes in ``ivf-pq``; for binary vectors, the share of
            equal bits, scaled to -1..1.

        Raises:
            InputError: the queries have another embedding space, width or dtype, ``k`` or ``effort`` is
                below 1, or a condition does not fit the columns.
        """
        self.space.require(fingerprint, holder=str(self.location))
        if k < 1 or (effort is not None and effort < 1):
            raise InputError(f"k is {k} and effort {effort}; expected at least 1.")
        if effort is not None and not self.record.effort:
            raise InputError(f"{self.location} is a flat index, so every row is compared. Leave effort out.")
        decoded = self.space.decoded_queries(queries)
        found, first = [], 0
        for segment in self._segments:
            scores, rows = faiss_index.neighbours(
                segment.index,
                self.space,
                decoded,
                k=k,
                effort=effort or self.record.effort or None,
                allowed=self._allowed(segment, where),
            )
            found.append((scores, np.where(rows >= 0, rows + first, rows)))
            first += segment.rows.num_rows
        scores, rows = faiss_index.best_first(
            np.hstack([scores for scores, _ in found]), np.hstack([rows for _, rows in found])
        )
        scores, rows = scores[:, :k], rows[:, :k]
        kept = self._rows_by_number(np.unique(rows[rows >= 0]))
        return [
            [hit_from_row(kept[row], score) for row, score in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _allowed(self, segment: _OpenSegment, where: Sequence[Condition]) -> NDArray[np.bool_] | None:
        if not where:
            return segment.allowed
        met = rows_that_meet(where, segment.rows, holder=str(self.location))
        return met if segment.allowed is None else met & segment.allowed

    def _rows_by_number(self, numbers: NDArray[np.int64]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        first = 0
        for segment in self._segments:
            end = first + segment.rows.num_rows
            own = numbers[(numbers >= first) & (numbers < end)] - first
            found |= {first + row: kept for row, kept in rows_by_number(segment.rows, own).items()}
            first = end
        return found

    def search_texts(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        language: str | Sequence[str] | None = None,
        *,
        k: int = 10,
        effort: int | None = None,
        where: Sequence[Condition] = (),
    ) -> list[list[Hit]]:
        """Embed texts and search for them; see ``search``.

        Args:
            language: Language code, one for all texts or one per text.

        Raises:
            InputError: the encoder is of another space, checked before embedding; or as in ``search`` and
                ``Encoder.embed_texts``.
        """
        queries = queries_from_texts(self.space, encoder, texts, language, holder=str(self.location))
        return self.search(queries, fingerprint=encoder.fingerprint, k=k, effort=effort, where=where)

    def close(self) -> None:
        """Release the index's files."""
        self._segments = ()

    def __enter__(self) -> VectorIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _opened(folder: Path, record: IndexRecord, segment: Segment) -> _OpenSegment:
    index = faiss_index.index_from_file(folder / segment.index, record.space)
    rows = rows_from_file(folder / segment.ids)
    if not index.ntotal == rows.num_rows == segment.n_rows:
        raise _mixed(folder, index.ntotal, rows.num_rows, segment.n_rows)
    return _OpenSegment(index, rows, allowed_rows(folder, segment))


def allowed_rows(folder: Path, segment: Segment) -> NDArray[np.bool_] | None:
    """Return which rows of a segment were not removed: bool (rows,), or ``None`` for all.

    Raises:
        DamagedVectorsError: the file of removed rows cannot be read.
    """
    if not segment.removed:
        return None
    allowed = np.ones(segment.n_rows, dtype=np.bool_)
    try:
        allowed[np.load(folder / segment.removed)] = False
    except (OSError, ValueError, IndexError) as error:
        raise DamagedVectorsError(
            f"{folder / segment.removed} cannot be read ({error}). Build the index again."
        ) from error
    return allowed


def _mixed(folder: Path, n_vectors: int, n_ids: int, n_rows: int) -> DamagedVectorsError:
    return DamagedVectorsError(
        f"{folder} has {n_vectors:,} vectors, {n_ids:,} ids and a record of {n_rows:,}. "
        "Its files are mixed with another index's: build the index again."
    )
