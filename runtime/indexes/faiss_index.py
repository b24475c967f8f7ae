"""FAISS indexes: create, train, fill, search, save and load, for every encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.counts import require_threads
from runtime.embeddings import INT8_SCALE, Encoding, bits_from_float
from runtime.errors import InputError, OutputFaultError
from runtime.extras import faiss
from runtime.indexes.cascade import Cascade, cascade_from_file, is_cascade_file
from runtime.indexes.plan import Kind, Plan, Refinement
from runtime.indexes.space import Space

__all__ = [
    "add",
    "best_first",
    "index_from_file",
    "index_from_plan",
    "neighbours",
    "rows_of_index",
    "save",
    "train",
    "use_threads",
]

_REFINE_FACTOR = 8
"""Candidates, in multiples of k, that are re-scored with the refining vectors."""


def use_threads(threads: int | None) -> int:
    """Set the number of FAISS threads of this process, unless ``None``, and return the current number.

    Raises:
        EngineError: it is no number from 1 to 1,024, or FAISS is not installed.
    """
    if require_threads(threads) is not None:
        faiss().omp_set_num_threads(threads)
    return int(faiss().omp_get_max_threads())


def index_from_plan(plan: Plan) -> Any:
    """Create an empty index; ``ivf-pq`` still has to be trained."""
    library = faiss()
    if plan.space.encoding is Encoding.BINARY:
        return _binary_index(plan)
    match plan.kind:
        case Kind.FLAT:
            return _whole_rows(plan.space.encoding, plan.space.dim)
        case Kind.IVF_PQ:
            index = _ivf_pq_index(plan)
            refine = Refinement(str(plan.parameters["refine"]))
            if refine is Refinement.NONE:
                return index
            return library.IndexRefine(index, _refining_rows(refine, plan.space))
        case Kind.HNSW:
            return _hnsw_index(plan)
        case Kind.CASCADE:
            return Cascade(plan.space.dim, plan.space.encoding)


def train(index: Any, vectors: NDArray[np.float32]) -> None:
    """Train lists and codes on sample rows: float32 (n, dim)."""
    parts = [index]
    if isinstance(index, faiss().IndexRefine):
        parts = [faiss().downcast_index(part) for part in (index.base_index, index.refine_index)]
    for part in parts:
        if not part.is_trained:
            part.train(np.ascontiguousarray(vectors))
    index.is_trained = True


def add(index: Any, space: Space, vectors: NDArray[Any]) -> None:
    """Add rows in their stored encoding."""
    rows = vectors if space.encoding is Encoding.BINARY else space.decoded(vectors)
    index.add(np.ascontiguousarray(rows))


def neighbours(
    index: Any,
    space: Space,
    queries: NDArray[np.float32],
    *,
    k: int,
    effort: int | None,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search the index: rows found for every query, best first; equal scores in row order.

    Args:
        queries: float32 (queries, dim), as returned by ``Space.decoded_queries``.
        effort: See ``Settings``.
        allowed: bool (rows,): rows that may be found; default: all.

    Returns:
        float32 scores and int64 row numbers, both (queries, k); row -1 if the index found fewer.
    """
    if isinstance(index, Cascade):
        return best_first(*index.neighbours(queries, k=k, effort=effort or k, allowed=allowed))
    if allowed is not None:
        return _allowed_neighbours(index, space, queries, k, effort, allowed)
    k = min(k, index.ntotal)
    parameters = _search_parameters(index, effort, k)
    if space.encoding is Encoding.BINARY:
        distances, rows = index.search(bits_from_float(queries), k, params=parameters)
        scores = np.where(rows < 0, -np.inf, 1 - 2 * distances / space.dim).astype(np.float32)
    else:
        scores, rows = index.search(np.ascontiguousarray(queries), k, params=parameters)
    return best_first(scores, rows)


def best_first(
    scores: NDArray[np.float32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Sort the rows found for every query, best first; equal scores in row order, row -1 last."""
    order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


_FEW = 0.1
"""Share of allowed rows below which a graph is not walked, since most of its rows would be refused."""


def _allowed_neighbours(
    index: Any,
    space: Space,
    queries: NDArray[np.float32],
    k: int,
    effort: int | None,
    allowed: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search among some rows, with rising effort until ``k`` of them are found."""
    library = faiss()
    n_allowed = int(allowed.sum())
    k = min(k, n_allowed)
    if k == 0:
        return np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    if isinstance(index, (library.IndexHNSW, library.IndexBinaryHNSW)) and n_allowed < _FEW * index.ntotal:
        is_binary = space.encoding is Encoding.BINARY
        downcast = library.downcast_IndexBinary if is_binary else library.downcast_index
        index = downcast(index.storage)
        effort = None
    if space.encoding is Encoding.BINARY:
        return _filtered_neighbours(index, space, queries, k, effort, allowed)
    bits = np.packbits(allowed, bitorder="little")
    selector = library.IDSelectorBitmap(bits)
    while True:
        parameters = _search_parameters(index, effort, k, selector)
        scores, rows = index.search(np.ascontiguousarray(queries), k, params=parameters)
        if effort is None or effort >= index.ntotal or (rows >= 0).all():
            return best_first(scores, rows)
        effort *= 2


def _filtered_neighbours(
    index: Any,
    space: Space,
    queries: NDArray[np.float32],
    k: int,
    effort: int | None,
    allowed: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search for more rows until ``k`` allowed ones are found: binary indexes of FAISS take no selector."""
    wanted = k
    while True:
        wanted = min(2 * wanted, index.ntotal)
        raised = None if effort is None else max(effort, wanted)
        scores, rows = neighbours(index, space, queries, k=wanted, effort=raised)
        is_good = (rows >= 0) & allowed[np.maximum(rows, 0)]
        if wanted == index.ntotal or (is_good.sum(axis=1) >= k).all():
            scores = np.where(is_good, scores, -np.inf).astype(np.float32)
            scores, rows = best_first(scores, np.where(is_good, rows, -1))
            return scores[:, :k], rows[:, :k]


def rows_of_index(index: Any, space: Space, start: int, n_rows: int) -> NDArray[Any]:
    """Return rows as the index keeps them: float32 (n, dim), or uint8 (n, ceil(dim / 8)) of packed bits."""
    library = faiss()
    if space.encoding is Encoding.BINARY:
        storage = index.storage if isinstance(index, library.IndexBinaryHNSW) else index
        flat = library.downcast_IndexBinary(storage)
        codes = library.vector_to_array(flat.xb).reshape(flat.ntotal, -1)
        rows: NDArray[Any] = codes[start : start + n_rows]
        return rows
    if isinstance(index, library.IndexIVF):
        index.make_direct_map()
    found: NDArray[np.float32] = index.reconstruct_n(start, n_rows)
    return found


def save(index: Any, path: Path) -> None:
    """Write the index to a file.

    Raises:
        OutputFaultError: the file cannot be written: what FAISS opened and cannot fill.
    """
    library = faiss()
    if isinstance(index, Cascade):
        return index.save(path)
    try:
        if isinstance(index, library.IndexBinary):
            library.write_index_binary(index, str(path))
        else:
            library.write_index(index, str(path))
    except RuntimeError as error:
        raise OutputFaultError(f"{path} cannot be written ({error}). Is the disk full?") from error


def index_from_file(path: Path, space: Space, *, in_memory: bool = False) -> Any:
    """Open an index written by ``save``, memory-mapped, or to add rows to in memory.

    Raises:
        InputError: the file is not a FAISS index, or not one of this encoding.
    """
    if is_cascade_file(path):
        return cascade_from_file(path)
    library = faiss()
    flags = 0 if in_memory else library.IO_FLAG_MMAP_IFC
    try:
        if space.encoding is Encoding.BINARY:
            return library.read_index_binary(str(path), flags)
        return library.read_index(str(path), flags)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read by FAISS ({error}). Build the index again.") from error


def _search_parameters(index: Any, effort: int | None, k: int, selector: Any = None) -> Any:
    """Return per-search parameters, so that threads may search one index with different efforts."""
    library = faiss()
    allowed = {} if selector is None else {"sel": selector}
    if effort is None:
        return library.SearchParameters(**allowed) if allowed else None
    if isinstance(index, library.IndexRefine):
        lists = library.SearchParametersIVF(nprobe=effort, **allowed)
        return library.IndexRefineSearchParameters(k_factor=_REFINE_FACTOR, base_index_params=lists)
    if isinstance(index, library.IndexIVF):
        return library.SearchParametersIVF(nprobe=effort, **allowed)
    return library.SearchParametersHNSW(efSearch=max(effort, k), **allowed)


def _binary_index(plan: Plan) -> Any:
    n_bits = 8 * -(-plan.space.dim // 8)
    if plan.kind is Kind.FLAT:
        return faiss().IndexBinaryFlat(n_bits)
    index = faiss().IndexBinaryHNSW(n_bits, int(plan.parameters["n_neighbours"]))
    index.hnsw.efConstruction = int(plan.parameters["build_width"])
    return index


def _hnsw_index(plan: Plan) -> Any:
    library = faiss()
    dim, n_neighbours = plan.space.dim, int(plan.parameters["n_neighbours"])
    if plan.space.encoding is Encoding.FLOAT32:
        index = library.IndexHNSWFlat(dim, n_neighbours, library.METRIC_INNER_PRODUCT)
    else:
        quantizer = _quantizer(plan.space.encoding)
        index = library.IndexHNSWSQ(dim, quantizer, n_neighbours, library.METRIC_INNER_PRODUCT)
        _fix_scale(library.downcast_index(index.storage), plan.space.encoding)
        index.is_trained = True
    index.hnsw.efConstruction = int(plan.parameters["build_width"])
    return index


def _ivf_pq_index(plan: Plan) -> Any:
    library, dim = faiss(), plan.space.dim
    n_lists, code_bytes = int(plan.parameters["n_lists"]), int(plan.parameters["code_bytes"])
    centroids = library.IndexFlatIP(dim)
    index = library.IndexIVFPQ(centroids, dim, n_lists, code_bytes, 8, library.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    for clustering in (index.cp, index.pq.cp):
        clustering.seed = plan.seed
        clustering.min_points_per_centroid = 1  # our own check reports too few rows, not FAISS on stderr
    return index


def _refining_rows(refine: Refinement, space: Space) -> Any:
    """Create the refining index; its 8-bit rows fit each component's range, except for int8 vectors."""
    library = faiss()
    if refine is Refinement.INT8 and space.encoding is not Encoding.INT8:
        eight_bits = library.ScalarQuantizer.QT_8bit
        return library.IndexScalarQuantizer(space.dim, eight_bits, library.METRIC_INNER_PRODUCT)
    return _whole_rows(Encoding(refine.value), space.dim)


def _whole_rows(encoding: Encoding, dim: int) -> Any:
    library = faiss()
    if encoding is Encoding.FLOAT32:
        return library.IndexFlatIP(dim)
    index = library.IndexScalarQuantizer(dim, _quantizer(encoding), library.METRIC_INNER_PRODUCT)
    _fix_scale(index, encoding)
    return index


def _quantizer(encoding: Encoding) -> int:
    kinds = faiss().ScalarQuantizer
    return int(kinds.QT_fp16 if encoding is Encoding.FLOAT16 else kinds.QT_8bit_uniform)


def _fix_scale(index: Any, encoding: Encoding) -> None:
    """Make FAISS decode int8 components the way babeltower does.

    FAISS decodes byte b as ``low + (b + 0.5) / 255 · span``; with these values, byte ``x + 127`` decodes to
    ``x / 127``.
    """
    if encoding is Encoding.INT8:
        low, span = -(INT8_SCALE + 0.5) / INT8_SCALE, 255 / INT8_SCALE
        faiss().copy_array_to_vector(np.array([low, span], dtype=np.float32), index.sq.trained)
    index.is_trained = True
