"""Index kinds and settings, and the plan that completes them from the vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from runtime.embeddings import Encoding
from runtime.errors import InputError
from runtime.indexes.space import Space

__all__ = ["Kind", "Plan", "Refinement", "Settings"]

N_CENTROIDS = 256
"""Centroids per byte of a product-quantized code, all of which training must find."""

POINTS_PER_CENTROID = 39
"""Training rows that FAISS recommends per centroid and per list; fewer give worse training."""

_TRAINING_ROWS_PER_LIST = 64


class Kind(str, Enum):
    """Search method of an index.

    ``FLAT`` compares with every row. ``IVF_PQ`` searches the nearest of many lists of product-quantized rows.
    ``HNSW`` walks a graph of neighbours over full rows. ``CASCADE`` compares the bits of every row, ranks the
    nearest by int8 rows and the best of these by rows as stored.
    """

    FLAT = "flat"
    IVF_PQ = "ivf-pq"
    HNSW = "hnsw"
    CASCADE = "cascade"


class Refinement(str, Enum):
    """Copy of every row that an ``ivf-pq`` index keeps to re-rank candidates."""

    NONE = "none"
    INT8 = "int8"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Build settings of an index; ``None`` is chosen from the number of rows and the width.

    Attributes:
        n_lists: ``ivf-pq``: number of inverted lists.
        code_bytes: ``ivf-pq``: bytes per product-quantized row; must divide the width.
        refine: ``ivf-pq``: see ``Refinement``; default: ``int8``.
        n_training_rows: ``ivf-pq``: randomly drawn rows to train lists and codes on.
        n_neighbours: ``hnsw``: neighbours of a row in the upper layers, twice as many in the lowest; default:
            32.
        build_width: ``hnsw``: candidates kept while searching a row's neighbours; default: 128.
        effort: Lists that a search visits (``ivf-pq``), or candidates that it keeps (``hnsw``) or ranks by
            int8 rows (``cascade``); default: the lowest that reaches the target recall.
    """

    n_lists: int | None = None
    code_bytes: int | None = None
    refine: Refinement | None = None
    n_training_rows: int | None = None
    n_neighbours: int | None = None
    build_width: int | None = None
    effort: int | None = None


_SETTINGS_OF = {
    Kind.FLAT: frozenset[str](),
    Kind.IVF_PQ: frozenset({"n_lists", "code_bytes", "refine", "n_training_rows", "effort"}),
    Kind.HNSW: frozenset({"n_neighbours", "build_width", "effort"}),
    Kind.CASCADE: frozenset({"effort"}),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Complete plan of an index: its kind, space and all settings.

    Attributes:
        parameters: Settings by their names in ``Settings``.
        n_training_rows: Rows to train on; 0 if nothing is trained.
        seed: Seed of FAISS's random draws.
    """

    kind: Kind
    space: Space
    parameters: Mapping[str, int | str]
    n_training_rows: int
    seed: int

    @classmethod
    def of(cls, kind: Kind, space: Space, *, settings: Settings, n_rows: int, seed: int) -> Plan:
        """Make a plan, choosing the settings left as ``None``.

        Args:
            n_rows: Rows available for training.

        Raises:
            InputError: a setting does not apply to the kind or fit the vectors, or there are too few rows.
        """
        given = {f.name: v for f in fields(settings) if (v := getattr(settings, f.name)) is not None}
        foreign = sorted(given.keys() - _SETTINGS_OF[kind])
        if foreign:
            raise InputError(
                f"{foreign[0]} is not a setting of a {kind.value} index, whose settings are "
                f"{sorted(_SETTINGS_OF[kind]) or 'none'}. Leave it out, or choose another kind."
            )
        low = [name for name, value in given.items() if isinstance(value, int) and value < 1]
        if low:
            raise InputError(f"{low[0]} is {given[low[0]]}; expected at least 1.")
        if kind is Kind.IVF_PQ:
            return cls._ivf_pq(space, settings, n_rows, seed)
        if kind is Kind.CASCADE and space.encoding is Encoding.BINARY:
            raise InputError(
                "A cascade ranks the candidates of bits by int8 or float rows, and binary vectors have none. "
                "Choose flat or hnsw, or embed with encoding int8, float16 or float32."
            )
        parameters: dict[str, int | str] = {}
        if kind is Kind.HNSW:
            parameters = {
                "n_neighbours": settings.n_neighbours or 32,
                "build_width": settings.build_width or 128,
            }
            if parameters["n_neighbours"] == 1:
                raise InputError("n_neighbours is 1; a connected graph needs at least 2.")
        return cls(kind, space, parameters, 0, seed)

    @classmethod
    def _ivf_pq(cls, space: Space, settings: Settings, n_rows: int, seed: int) -> Plan:
        if space.encoding is Encoding.BINARY:
            raise InputError(
                "ivf-pq cannot compress binary vectors: they have no components to quantize. "
                "Choose flat or hnsw, or embed with encoding int8."
            )
        code_bytes = settings.code_bytes or _divisor(space.dim, at_most=max(1, space.dim // 4))
        if space.dim % code_bytes:
            fitting = [n for n in range(1, space.dim + 1) if space.dim % n == 0]
            raise InputError(
                f"code_bytes is {code_bytes}, which does not divide the width {space.dim}. "
                f"Choose one of {fitting}."
            )
        n_lists = settings.n_lists or max(1, min(round(4 * math.sqrt(n_rows)), n_rows // POINTS_PER_CENTROID))
        enough = max(_TRAINING_ROWS_PER_LIST * n_lists, N_CENTROIDS * N_CENTROIDS)
        n_training = min(settings.n_training_rows or enough, n_rows)
        least = max(N_CENTROIDS, n_lists)
        if n_training < least:
            raise InputError(
                f"{n_training:,} rows are too few to train an ivf-pq index with {n_lists:,} lists: it needs "
                f"at least {least:,}, and {POINTS_PER_CENTROID * least:,} to train well. Choose flat or "
                "hnsw, which need no training, or fewer lists, or embed more rows."
            )
        parameters: dict[str, int | str] = {
            "n_lists": n_lists,
            "code_bytes": code_bytes,
            "refine": (settings.refine or Refinement.INT8).value,
            "n_training_rows": n_training,
        }
        return cls(Kind.IVF_PQ, space, parameters, n_training, seed)

    @property
    def row_bytes(self) -> int:
        """Memory per row of the index, in bytes, without its id."""
        width, dim = self.space.encoding, self.space.dim
        stored = {
            Encoding.FLOAT32: 4 * dim,
            Encoding.FLOAT16: 2 * dim,
            Encoding.INT8: dim,
            Encoding.BINARY: -(-dim // 8),
        }
        match self.kind:
            case Kind.FLAT:
                return stored[width]
            case Kind.CASCADE:
                finest = 0 if width is Encoding.INT8 else stored[width]
                return -(-dim // 8) + dim + finest
            case Kind.HNSW:
                return stored[width] + 4 * (2 * int(self.parameters["n_neighbours"]) + 4)
            case Kind.IVF_PQ:
                refine = str(self.parameters["refine"])
                refining = 0 if refine == Refinement.NONE else stored[Encoding(refine)]
                return int(self.parameters["code_bytes"]) + 8 + refining

    @property
    def n_well_trained_rows(self) -> int:
        """Training rows that FAISS recommends; 0 if nothing is trained."""
        if not self.n_training_rows:
            return 0
        return POINTS_PER_CENTROID * max(N_CENTROIDS, int(self.parameters["n_lists"]))

    def efforts(self) -> list[int]:
        """Return the efforts to measure, ascending; empty if the search has no effort setting."""
        match self.kind:
            case Kind.FLAT:
                return []
            case Kind.IVF_PQ:
                n_lists = int(self.parameters["n_lists"])
                return [*(2**i for i in range(n_lists.bit_length()) if 2**i < n_lists), n_lists]
            case Kind.CASCADE:
                return [2**i for i in range(4, 14)]
            case Kind.HNSW:
                return [16, 32, 64, 128, 256, 512, 1024, 2048]


def _divisor(number: int, *, at_most: int) -> int:
    return next(n for n in range(at_most, 0, -1) if number % n == 0)
