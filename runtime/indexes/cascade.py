"""Cascade of three encodings: bits find candidates, int8 rows rank them, rows as stored give the scores.

Only the bits, a thirty-second of float32 rows, are read whole for a query; int8 and float rows of the
candidates are read from the mapped file. Candidates of bits are counted by the effort of a search, and a
quarter of them, but at least ``k``, are scored by the last stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.embeddings import INT8_SCALE, Encoding, bits_from_float, float_from_int8, int8_from_float
from runtime.errors import InputError
from runtime.extras import faiss

__all__ = ["Cascade", "cascade_from_file", "is_cascade_file"]

_MAGIC = b"babeltower cascade 1\n"
_ALIGNED = 64
_LAST_SHARE = 4
"""Candidates of the bits for each one that the last stage scores."""

_FLOATS = {Encoding.FLOAT32: np.float32, Encoding.FLOAT16: np.float16}


@dataclass(slots=True)
class Cascade:
    """Rows of a cascade, with the part of FAISS's interface that indexes here use.

    Attributes:
        bits: FAISS binary index of the rows' signs.
        small: int8 (rows, dim).
        whole: float (rows, dim) as stored; ``None`` for int8 vectors, whose second stage is the last.
    """

    dim: int
    encoding: Encoding
    bits: Any = None
    small: Any = None
    whole: Any = None
    _added: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.bits is None:
            self.bits = faiss().IndexBinaryFlat(8 * -(-self.dim // 8))
            self.small = np.empty((0, self.dim), dtype=np.int8)
            if self.encoding in _FLOATS:
                self.whole = np.empty((0, self.dim), dtype=_FLOATS[self.encoding])

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return int(self.bits.ntotal)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Add rows: float32 (n, dim)."""
        self.bits.add(bits_from_float(vectors))
        self._added.append(vectors)

    def _gather(self) -> None:
        """Encode the rows that were added since the last search, all at once."""
        if self._added:
            rows = np.concatenate(self._added)
            self._added = []
            self.small = np.concatenate([self.small, int8_from_float(rows)])
            if self.whole is not None:
                self.whole = np.concatenate([self.whole, rows.astype(self.whole.dtype)])

    def reconstruct_n(self, start: int, n_rows: int) -> NDArray[np.float32]:
        """Return rows: float32 (n_rows, dim)."""
        self._gather()
        if self.whole is not None:
            whole: NDArray[np.float32] = np.asarray(self.whole[start : start + n_rows], dtype=np.float32)
            return whole
        small: NDArray[np.float32] = float_from_int8(self.small[start : start + n_rows])
        return small

    def neighbours(
        self,
        queries: NDArray[np.float32],
        *,
        k: int,
        effort: int,
        allowed: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores and rows of every query, as ``faiss_index.neighbours`` does."""
        self._gather()
        n_rows = self.ntotal if allowed is None else int(allowed.sum())
        k = min(k, n_rows)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        if k:
            candidates = self._candidates(queries, min(max(effort, k), n_rows), allowed)
            for number, (query, found) in enumerate(zip(queries, candidates, strict=True)):
                scores[number], rows[number] = self._ranked(query, found, k)
        return scores, rows

    def _candidates(
        self, queries: NDArray[np.float32], wanted: int, allowed: NDArray[np.bool_] | None
    ) -> list[NDArray[np.int64]]:
        """Return the rows of the nearest bits of every query, ascending.

        FAISS cannot restrict a search of bits to some rows, so more are asked for until enough are allowed.
        """
        bits, asked = bits_from_float(queries), wanted
        while True:
            _, found = self.bits.search(bits, asked)
            if allowed is None:
                return [np.sort(one) for one in found]
            kept = [one[allowed[one]][:wanted] for one in found]
            if asked == self.ntotal or all(len(one) == wanted for one in kept):
                return [np.sort(one) for one in kept]
            asked = min(2 * asked, self.ntotal)

    def _ranked(
        self, query: NDArray[np.float32], rows: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores = self.small[rows].astype(np.float32) @ query / np.float32(INT8_SCALE)
        if self.whole is not None:
            kept = np.sort(_best(scores, max(k, len(rows) // _LAST_SHARE)))
            rows = rows[kept]
            scores = self.whole[rows].astype(np.float32) @ query
        best = _best(scores, k)
        return scores[best].astype(np.float32), rows[best]

    def save(self, path: Path) -> None:
        """Write one file: a head, the bits, the int8 rows, the rows as stored.

        Raises:
            OSError: the file cannot be written.
        """
        self._gather()
        bits = faiss().serialize_index_binary(self.bits)
        head = {"dim": self.dim, "encoding": self.encoding.value, "rows": self.ntotal, "bits": len(bits)}
        with path.open("wb") as file:
            file.write(_MAGIC + json.dumps(head).encode() + b"\n")
            for array in (bits, self.small, self.whole):
                if array is not None:
                    file.write(bytes(-file.tell() % _ALIGNED))
                    np.ascontiguousarray(array).tofile(file)


def is_cascade_file(path: Path) -> bool:
    """Return True for a file that ``Cascade.save`` wrote."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def cascade_from_file(path: Path) -> Cascade:
    """Open a file that ``Cascade.save`` wrote: the bits in memory, the rows mapped.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            file.seek(len(_MAGIC))
            head = json.loads(file.readline())
            dim, n_rows, encoding = int(head["dim"]), int(head["rows"]), Encoding(head["encoding"])
            file.seek(file.tell() + (-file.tell() % _ALIGNED))
            data = np.fromfile(file, dtype=np.uint8, count=int(head["bits"]))
            bits = faiss().deserialize_index_binary(data)
            at = file.tell() + (-file.tell() % _ALIGNED)
        small = _mapped(path, np.int8, at, (n_rows, dim))
        at += small.nbytes
        whole = None
        if encoding in _FLOATS:
            whole = _mapped(path, _FLOATS[encoding], at + (-at % _ALIGNED), (n_rows, dim))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read as a cascade ({error}). Build the index again.") from error
    return Cascade(dim, encoding, bits, small, whole)


def _mapped(path: Path, dtype: Any, offset: int, shape: tuple[int, int]) -> NDArray[Any]:
    if not shape[0]:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the positions of the ``k`` best scores, best first; equal ones by position."""
    order: NDArray[np.int64] = np.argsort(-scores, kind="stable")[:k]
    return order
