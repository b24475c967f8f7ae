"""Search in an index on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import Encoder
from runtime.errors import InputError
from runtime.indexes import faiss_index
from runtime.indexes.exact import Hit
from runtime.indexes.folder import ids_from_file, ids_of_rows
from runtime.indexes.record import IDS_FILE, INDEX_FILE, IndexRecord
from runtime.indexes.space import Space, queries_from_texts

__all__ = ["VectorIndex"]


class VectorIndex:
    """Index built by ``babeltower index``; safe to search from several threads.

    The files are memory-mapped: opening is fast, and processes that open the same index share its pages.

        with VectorIndex.open("captions.index") as index:
            found = index.search_texts(encoder, ["gato preto"], "por_Latn")
    """

    def __init__(self, location: Path, record: IndexRecord, index: Any, ids: Any) -> None:
        self.location = location
        self.record = record
        self._index = index
        self._ids = ids

    @classmethod
    def open(cls, location: str | os.PathLike[str], *, threads: int | None = None) -> VectorIndex:
        """Open an index's folder.

        Args:
            threads: Threads of FAISS in this process; default: unchanged.

        Raises:
            InputError: the folder holds no index, or the index is damaged or of another version.
            EngineError: FAISS or pyarrow is not installed.
        """
        folder = Path(location)
        record = IndexRecord.read(folder)
        faiss_index.use_threads(threads)
        index = faiss_index.index_from_file(folder / INDEX_FILE, record.space)
        ids = ids_from_file(folder / IDS_FILE)
        if not index.ntotal == len(ids) == record.n_rows:
            raise InputError(
                f"{folder} has {index.ntotal:,} vectors, {len(ids):,} ids and a record of {record.n_rows:,}. "
                "Its files are mixed with another index's: build the index again."
            )
        return cls(folder, record, index, ids)

    def __len__(self) -> int:
        return self.record.n_rows

    @property
    def space(self) -> Space:
        """Fingerprint, width and encoding of the vectors."""
        return self.record.space

    def search(
        self, queries: NDArray[Any], *, fingerprint: str, k: int = 10, effort: int | None = None
    ) -> list[list[Hit]]:
        """Return the nearest rows found for every query, best first; equal scores in row order.

        Args:
            queries: float32 (queries, dim) of any norm, or in the encoding of the index.
            fingerprint: Fingerprint of the encoder that embedded the queries.
            k: Results per query; fewer if the index is smaller, or if the lists that an ``ivf-pq`` search
                visits hold fewer.
            effort: See ``Settings.effort``; default: the one chosen when the index was measured.

        Returns:
            One list per query. A score is the dot product of the unit-length query with the stored row: exact
            in ``flat`` and ``hnsw``, estimated from codes in ``ivf-pq``; for binary vectors, the share of
            equal bits, scaled to -1..1.

        Raises:
            InputError: the queries have another embedding space, width or dtype, or ``k`` or ``effort`` is
                below 1.
        """
        self.space.require(fingerprint, holder=str(self.location))
        if k < 1 or (effort is not None and effort < 1):
            raise InputError(f"k is {k} and effort {effort}; expected at least 1.")
        if effort is not None and not self.record.effort:
            raise InputError(f"{self.location} is a flat index, so every row is compared. Leave effort out.")
        decoded = self.space.decoded_queries(queries)
        scores, rows = faiss_index.neighbours(
            self._index, self.space, decoded, k=k, effort=effort or self.record.effort or None
        )
        ids = ids_of_rows(self._ids, np.unique(rows[rows >= 0]))
        return [
            [Hit(ids[row], score) for row, score in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def search_texts(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        language: str | Sequence[str] | None = None,
        *,
        k: int = 10,
        effort: int | None = None,
    ) -> list[list[Hit]]:
        """Embed texts and search for them; see ``search``.

        Args:
            language: Language code, one for all texts or one per text.

        Raises:
            InputError: the encoder is of another space, checked before embedding; or as in ``search`` and
                ``Encoder.embed_texts``.
        """
        queries = queries_from_texts(self.space, encoder, texts, language, holder=str(self.location))
        return self.search(queries, fingerprint=encoder.fingerprint, k=k, effort=effort)

    def close(self) -> None:
        """Release the index's files."""
        self._index = self._ids = None

    def __enter__(self) -> VectorIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
