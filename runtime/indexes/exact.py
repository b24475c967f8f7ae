"""Exact nearest-neighbour search over a matrix in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import require_directions, unit_rows
from runtime.embeddings import Encoding, cosine_similarity, hamming_distance
from runtime.errors import InputError
from runtime.fingerprints import remark_on_vectors, same_space
from runtime.storage import replace_file

__all__ = ["Hit", "Index", "Nearest"]

_BLOCK_ROWS = 16_384
"""Number of vectors scored at once."""

_DTYPES = {
    Encoding.FLOAT32: np.float32,
    Encoding.FLOAT16: np.float16,
    Encoding.INT8: np.int8,
    Encoding.BINARY: np.uint8,
}


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        score: Cosine, or for binary vectors the share of equal bits in -1..1.
        kept: Columns that ``babeltower embed --keep`` carried through.
        number: The id as a number, where ids are stored as integers.
    """

    id: str
    score: float
    kept: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """Vectors of one embedding space and their ids.

    Attributes:
        ids: One string per row.
        vectors: Vectors as returned by an encoder: float32 or float16 (n, dim), L2-normalised; int8 (n, dim);
            or uint8 (n, ceil(dim / 8)) of packed bits.
        fingerprint: Embedding space of the vectors; queries from another space are rejected.
        encoding: Storage format of the vectors.

    Raises:
        InputError: the numbers of ids and rows differ, or the array does not fit the encoding.
    """

    ids: tuple[str, ...]
    vectors: NDArray[Any]
    fingerprint: str
    encoding: Encoding = Encoding.FLOAT32

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.dtype != _DTYPES[self.encoding]:
            raise InputError(
                f"The vectors are {self.vectors.dtype} {self.vectors.shape}; {self.encoding.value} vectors "
                f"must be {np.dtype(_DTYPES[self.encoding])} (n, dim)."
            )
        if len(self.ids) != len(self.vectors):
            raise InputError(
                f"There are {len(self.ids)} ids for {len(self.vectors)} vectors; pass one id per row."
            )

    def search(self, queries: NDArray[Any], *, fingerprint: str, k: int = 10) -> list[list[Hit]]:
        """Return the ``k`` nearest rows of every query, best first; equal scores in row order.

        Args:
            queries: (queries, dim) in the index's encoding.
            fingerprint: Fingerprint of the encoder that embedded the queries.
            k: Results per query; fewer if the index is smaller.

        Raises:
            InputError: the queries have another embedding space, width or encoding, ``k`` is below 1, a query
                is zero or not finite, or a row is not finite. A zero row scores 0.
        """
        self._require_fitting(queries, fingerprint, k)
        nearest = Nearest(len(queries), k)
        for start in range(0, len(self.vectors), _BLOCK_ROWS):
            nearest.see(self._scores(queries, self.vectors[start : start + _BLOCK_ROWS]))
        return [
            [Hit(self.ids[row], float(score)) for row, score in zip(*found, strict=True)]
            for found in zip(nearest.rows, nearest.scores, strict=True)
        ]

    def _scores(self, queries: NDArray[Any], block: NDArray[Any]) -> NDArray[np.float32]:
        if self.encoding is Encoding.BINARY:
            equal: NDArray[np.float64] = 1 - hamming_distance(queries, block) / (4 * block.shape[1])
            return equal.astype(np.float32)
        if self.encoding in (Encoding.FLOAT16, Encoding.INT8):
            return cosine_similarity(queries, block)
        cosines: NDArray[np.float32] = queries @ block.T
        if not np.isfinite(cosines).all():
            unit_rows(block)  # raises an error that names the rows
        return cosines

    def _require_fitting(self, queries: NDArray[Any], fingerprint: str, k: int) -> None:
        if not same_space(fingerprint, self.fingerprint):
            raise InputError(
                f"The index holds vectors of space {self.fingerprint!r}, but the queries are from "
                f"{fingerprint!r}: their scores are meaningless. Embed both with the same model."
                + remark_on_vectors(self.fingerprint, fingerprint)
            )
        expected = self.vectors.shape[1]
        if queries.ndim != 2 or queries.shape[1] != expected or queries.dtype != self.vectors.dtype:
            raise InputError(
                f"The queries are {queries.dtype} {queries.shape}; this index expects {self.vectors.dtype} "
                f"(n, {expected}). Embed them with the same dim and encoding={self.encoding.value!r}."
            )
        if k < 1:
            raise InputError(f"k is {k}; expected at least 1.")
        if self.encoding is not Encoding.BINARY:
            require_directions(queries, what="queries")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, whole or not at all."""

        def write(unfinished: Path) -> None:
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    ids=np.asarray(self.ids, dtype=np.str_),
                    vectors=self.vectors,
                    fingerprint=np.asarray(self.fingerprint),
                    encoding=np.asarray(self.encoding.value),
                )

        replace_file(Path(path), write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Read an index written by ``save``.

        Raises:
            InputError: the file is missing, or is not an index.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    ids=tuple(arrays["ids"].tolist()),
                    vectors=arrays["vectors"],
                    fingerprint=str(arrays["fingerprint"]),
                    encoding=Encoding(str(arrays["encoding"])),
                )
        except FileNotFoundError:
            raise InputError(f"Index {os.fspath(path)} does not exist.") from None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, AttributeError, TypeError) as error:
            raise InputError(
                f"{os.fspath(path)} is not a babeltower index ({error}). It may be truncated: build it again."
            ) from error


class Nearest:
    """Running top-k rows of every query over consecutive blocks of rows.

    Attributes:
        scores: float32 (queries, up to k), best first.
        rows: int64 of the same shape: row numbers in the order of the blocks; equal scores have the lower row
            first.
    """

    def __init__(self, n_queries: int, k: int) -> None:
        self.scores: NDArray[np.float32] = np.empty((n_queries, 0), dtype=np.float32)
        self.rows: NDArray[np.int64] = np.empty((n_queries, 0), dtype=np.int64)
        self._k = k
        self._n_seen = 0

    def see(self, block: NDArray[np.float32]) -> None:
        """Add the scores of the next rows: float32 (queries, rows)."""
        numbers = np.arange(self._n_seen, self._n_seen + block.shape[1])
        self._n_seen += block.shape[1]
        if self.scores.shape[1] < self._k:
            self.scores, self.rows = self._merged(slice(None), block, numbers)
        elif block.shape[1]:
            better = np.flatnonzero(block.max(axis=1) > self.scores[:, -1])
            self.scores[better], self.rows[better] = self._merged(better, block[better], numbers)

    def _merged(
        self, lines: slice | NDArray[np.int64], block: NDArray[np.float32], numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        rows = np.hstack([self.rows[lines], np.broadcast_to(numbers, block.shape)])
        return _best(np.hstack([self.scores[lines], block]), rows, self._k)


def _best(
    scores: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keep the ``k`` best columns of each line, best first; equal scores have the lower row first."""
    if scores.shape[1] > k:
        threshold = np.partition(scores, -k, axis=1)[:, -k, None]
        surely = scores > threshold
        ties = (scores == threshold) & (np.cumsum(scores == threshold, axis=1) <= k - surely.sum(1)[:, None])
        kept = surely | ties
        scores, rows = scores[kept].reshape(-1, k), rows[kept].reshape(-1, k)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
