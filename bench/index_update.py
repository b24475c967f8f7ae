"""Measure what adding one percent to an index costs, against building it again, and the recall of both.

    python -m bench.index_update --work FOLDER --json FILE --kind flat
    python -m bench.index_update --work FOLDER --json FILE --kind hnsw --rows 100000

CPU seconds of all threads. The vectors are generated, unit vectors around random centres, since the samples
that ``bench.index`` measures have no million rows. The file's other records are kept if they are of this
machine and commit. ``bench/results/index_update.json`` has the record of a run.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray

from bench.records.record import Record, record_of, records_to_keep, suite_cell, write_records
from runtime.cosines import unit_rows
from runtime.indexes import Kind, VectorIndex, index_from_vectors
from runtime.indexes.update import update_index

_DIM = 64
_N_CENTRES = 2_000
_SPREAD = 0.6
_N_QUERIES = 500
_QUERIES_AT_ONCE = 20
_K = 10
_FINGERPRINT = "generated"
_WAYS = ("one percent added", "built anew")


def _way(kind: Kind, way: str) -> str:
    return f"{kind.value}, {way}"


def _vectors(n: int, seed: int) -> NDArray[np.float32]:
    centres = np.random.default_rng(0).standard_normal((_N_CENTRES, _DIM)).astype(np.float32)
    random = np.random.default_rng(seed)
    noise = random.standard_normal((n, _DIM)).astype(np.float32)
    vectors = centres[random.integers(0, _N_CENTRES, n)] + _SPREAD * noise
    return unit_rows(vectors)


def _write(path: Path, first_id: int, vectors: NDArray[np.float32]) -> None:
    import pyarrow
    import pyarrow.parquet

    said = {"version": "1", "model": "generated", "fingerprint": _FINGERPRINT, "dim": str(_DIM)}
    said |= {"encoding": "float32", "modality": "text"}
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), _DIM)
    schema = pyarrow.schema(
        [
            pyarrow.field("id", pyarrow.int64(), nullable=False),
            pyarrow.field("vector", column.type, nullable=False),
        ],
        metadata={f"babeltower.{key}": value for key, value in said.items()},
    )
    ids = pyarrow.array(range(first_id, first_id + len(vectors)), pyarrow.int64())
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([ids, column], schema=schema), path)


def _cpu_seconds(act: Callable[[], Any]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def _nearest(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the numbers of the nearest rows of each query, in no order: int64 (queries, 10)."""
    found = [
        np.argpartition(-(queries[at : at + _QUERIES_AT_ONCE] @ rows.T), _K, axis=1)[:, :_K]
        for at in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return np.concatenate(found)


def _recall(index: Path, queries: NDArray[np.float32], nearest: NDArray[np.int64]) -> float:
    found = VectorIndex.open(index).search(queries, k=_K, fingerprint=_FINGERPRINT)
    pairs = zip(found, nearest.tolist(), strict=True)
    hits = [len({int(hit.id) for hit in row} & set(true)) for row, true in pairs]
    return float(np.mean(hits)) / _K


def _records(work: Path, kind: Kind, n_rows: int, threads: int) -> list[Record]:
    folder, grown, rebuilt = work / "vectors", work / "grown.index", work / "rebuilt.index"
    for path in (folder, grown, rebuilt):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True)
    n_new = n_rows // 100
    rows, new = _vectors(n_rows, 1), _vectors(n_new, 2)
    for part, start in enumerate(range(0, n_rows, 100_000)):
        _write(folder / f"part-{part:05d}.parquet", start, rows[start : start + 100_000])
    index_from_vectors(folder, grown, kind=kind, threads=threads)
    _write(folder / "part-90000.parquet", n_rows, new)
    update = _cpu_seconds(lambda: update_index(grown, folder, threads=threads))
    build = _cpu_seconds(lambda: index_from_vectors(folder, rebuilt, kind=kind, threads=threads))
    queries = _vectors(_N_QUERIES, 3)
    nearest = _nearest(queries, np.concatenate([rows, new]))
    recalls = {"grown": _recall(grown, queries, nearest), "rebuilt": _recall(rebuilt, queries, nearest)}
    typer.echo(
        f"{kind.value}: adding {n_new:,} rows to {n_rows:,} takes {update:.2f} CPU s, building anew "
        f"{build:.1f} ({update / build:.1%}); recall@{_K} {recalls['grown']:.4f} and {recalls['rebuilt']:.4f}"
    )
    cell = {**suite_cell(suite="corpus", metric="cpu"), "corpus": f"generated, {n_rows} rows of {_DIM}"}
    settings = {"rows": n_rows, "added": n_new, "threads": threads}
    return [
        record_of(
            {**cell, "way": _way(kind, way)},
            [seconds],
            unit="s",
            settings={**settings, "recall_at_10": recalls[name]},
        )
        for way, seconds, name in zip(_WAYS, (update, build), recalls, strict=True)
    ]


def main(
    work: Annotated[Path, typer.Option(help="Folder for vectors and indexes.")],
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 1_000_000,
    kinds: Annotated[
        list[Kind] | None, typer.Option("--kind", help="Kind of index; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of FAISS.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the records to this file.")] = None,
) -> None:
    """Measure each kind of index."""
    chosen = kinds or [Kind.FLAT, Kind.HNSW]
    again = {_way(kind, way) for kind in chosen for way in _WAYS}
    kept = [] if json is None else records_to_keep(json, lambda old: old.cell["way"] in again)
    records: list[Record] = []
    for kind in chosen:
        records += _records(work, kind, rows, threads)
        if json is not None:
            write_records([*kept, *records], json)


if __name__ == "__main__":
    typer.run(main)
