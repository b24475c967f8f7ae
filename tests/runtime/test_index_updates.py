"""An index follows its folder: files are added, rows removed, segments merged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sample_models import ROOT
from vector_folders import unit_vectors, write_shard

pytest.importorskip("faiss")

from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import DamagedVectorsError, InputError
from runtime.indexes import Kind, Settings, VectorIndex, index_from_vectors
from runtime.indexes.conditions import Condition
from runtime.indexes.update import merge_segments, update_index

DIM, N = 32, 3_000
VECTORS = unit_vectors(N + 300, DIM)
SETTINGS = {
    Kind.FLAT: Settings(),
    Kind.HNSW: Settings(),
    Kind.IVF_PQ: Settings(n_lists=8, code_bytes=16),
    Kind.CASCADE: Settings(),
}


def part(folder: Path, number: int, start: int, stop: int, encoding: Encoding = Encoding.FLOAT32) -> Path:
    folder.mkdir(exist_ok=True)
    stored = encoded_from_float(VECTORS[start:stop], encoding)
    ids = [f"row {row}" for row in range(start, stop)]
    path = folder / f"part-{number:05d}.parquet"
    return write_shard(path, ids, stored, dim=DIM, encoding=encoding)


def found(index: Path, rows: list[int], k: int = 1, **options) -> list[list[str]]:
    with VectorIndex.open(index) as opened:
        hits = opened.search(VECTORS[rows], fingerprint="space", k=k, **options)
    return [[hit.id for hit in one] for one in hits]


def recall(index: Path, live: np.ndarray, queries: np.ndarray) -> float:
    """Share of the true ten nearest of the live rows that a search finds."""
    true = np.argsort(-(queries @ VECTORS[live].T), axis=1)[:, :10]
    with VectorIndex.open(index) as opened:
        hits = opened.search(queries, fingerprint="space", k=10)
    return float(
        np.mean(
            [
                len({f"row {live[t]}" for t in one} & {hit.id for hit in two}) / 10
                for one, two in zip(true, hits, strict=True)
            ]
        )
    )


@pytest.mark.parametrize("kind", Kind)
def test_new_files_are_added_and_gone_ones_removed(tmp_path, kind):
    folder, out = tmp_path / "vectors", tmp_path / "index"
    part(folder, 0, 0, 1_000)
    part(folder, 1, 1_000, N)
    index_from_vectors(folder, out, kind=kind, settings=SETTINGS[kind], threads=1)
    base = (out / "index.faiss").read_bytes()
    part(folder, 2, N, N + 300)
    change = update_index(out, folder, threads=1)
    assert (change.added, change.removed, change.record.n_rows) == (300, 0, N + 300)
    assert found(out, [5, N + 5]) == [["row 5"], [f"row {N + 5}"]]
    assert (out / "index.faiss").read_bytes() == base
    (folder / "part-00000.parquet").unlink()
    change = update_index(out, folder, threads=1)
    assert (change.added, change.removed, change.record.n_rows) == (0, 1_000, 2_300)
    assert found(out, [1_500, N + 5]) == [["row 1500"], [f"row {N + 5}"]]
    assert "row 5" not in found(out, [5], k=20)[0]
    again = update_index(out, folder, threads=1)
    assert (again.added, again.removed) == (0, 0)


@pytest.mark.parametrize("kind", Kind)
def test_recall_after_updates_and_after_a_merge_is_that_of_a_rebuild(tmp_path, kind):
    folder = tmp_path / "vectors"
    part(folder, 0, 0, N)
    index_from_vectors(folder, tmp_path / "updated", kind=kind, settings=SETTINGS[kind], threads=1)
    part(folder, 1, N, N + 300)
    update_index(tmp_path / "updated", folder, threads=1)
    index_from_vectors(folder, tmp_path / "rebuilt", kind=kind, settings=SETTINGS[kind], threads=1)
    queries, live = unit_vectors(200, DIM, seed=9), np.arange(N + 300)
    of_rebuild = recall(tmp_path / "rebuilt", live, queries)
    assert recall(tmp_path / "updated", live, queries) >= of_rebuild - 0.005
    record = merge_segments(tmp_path / "updated", threads=1)
    assert len(record.segments) == 1
    assert recall(tmp_path / "updated", live, queries) >= of_rebuild - 0.005


@pytest.mark.parametrize("encoding", Encoding)
def test_ids_are_removed_and_stay_so_when_segments_are_merged(tmp_path, encoding):
    folder, out = tmp_path / "vectors", tmp_path / "index"
    part(folder, 0, 0, N, encoding)
    kind = Kind.HNSW
    index_from_vectors(folder, out, kind=kind, threads=1)
    part(folder, 1, N, N + 300, encoding)
    change = update_index(out, folder, remove=frozenset({"row 7", f"row {N + 1}", "row none"}), threads=1)
    assert (change.added, change.removed) == (300, 1)
    assert change.unknown_ids == (f"row {N + 1}", "row none")
    change = update_index(out, folder, remove=frozenset({f"row {N + 1}"}), threads=1)
    assert (change.removed, change.record.n_rows) == (1, N + 298)
    for _ in range(2):
        assert found(out, [8, N + 2]) == [["row 8"], [f"row {N + 2}"]]
        assert not {"row 7", f"row {N + 1}"} & {i for one in found(out, [7, N + 1], k=50) for i in one}
        assert merge_segments(out, threads=1).n_rows == N + 298


def test_an_update_needs_vectors_of_the_same_space(tmp_path):
    part(tmp_path / "vectors", 0, 0, 100)
    index_from_vectors(tmp_path / "vectors", tmp_path / "index")
    part(tmp_path / "int8", 0, 0, 100, Encoding.INT8)
    with pytest.raises(InputError, match="is of another space than the index"):
        update_index(tmp_path / "index", tmp_path / "int8")


@pytest.mark.parametrize("count", range(1, 7))
def test_a_killed_update_leaves_the_index_as_it_was(tmp_path, count):
    """Killed before each rename of the update: rows removed, ids, vectors, record."""
    folder, out = tmp_path / "vectors", tmp_path / "index"
    part(folder, 0, 0, 500)
    index_from_vectors(folder, out, threads=1)
    part(folder, 1, 500, 600)
    code = (
        "import itertools, os, signal\n"
        "real, numbers = os.replace, itertools.count(1)\n"
        f"stop = {count}\n"
        "def dying(*arguments):\n"
        "    if next(numbers) == stop: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "os.replace = dying\n"
        "from runtime.indexes.update import update_index\n"
        f"update_index({str(out)!r}, {str(folder)!r}, remove=frozenset({{'row 3'}}), threads=1)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    if killed.returncode == 0:
        assert count > 4
    else:
        assert killed.returncode == -9
        assert found(out, [3, 400]) == [["row 3"], ["row 400"]]
    update_index(out, folder, remove=frozenset({"row 3"}), threads=1)
    assert found(out, [4, 550]) == [["row 4"], ["row 550"]]
    with VectorIndex.open(out) as index:
        assert set(index.record.file_bytes) == {path.name for path in out.iterdir()} - {"index.json"}
        assert len(index) == 599


KILLED_BETWEEN_RENAMES = """
import os, pathlib, signal
import runtime.storage
runtime.storage._exchanged = lambda one, other: False
real = pathlib.Path.rename
def dying(self, target):
    moved = real(self, target)
    if str(target).endswith(".old"): os.kill(os.getpid(), signal.SIGKILL)
    return moved
pathlib.Path.rename = dying
from runtime.indexes import Kind, index_from_vectors
index_from_vectors({folder!r}, {out!r}, kind=Kind.HNSW, threads=1, replace=True)
"""


@pytest.mark.parametrize("then", ["search", "build"])
def test_a_replacement_that_is_killed_between_its_renames_loses_nothing(tmp_path, then):
    """Where the system cannot exchange two folders in one step."""
    folder, out = tmp_path / "vectors", tmp_path / "index"
    part(folder, 0, 0, 500)
    index_from_vectors(folder, out, threads=1)
    code = KILLED_BETWEEN_RENAMES.format(folder=str(folder), out=str(out))
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -9
    assert not out.exists()
    if then == "build":
        with pytest.raises(InputError, match="already holds an index"):
            index_from_vectors(folder, out, threads=1)
    assert found(out, [3]) == [["row 3"]]
    with VectorIndex.open(out) as index:
        assert index.record.kind == "flat"


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow"])
def test_a_flipped_byte_of_an_index_is_named(tmp_path, name):
    part(tmp_path / "vectors", 0, 0, 500)
    index_from_vectors(tmp_path / "vectors", tmp_path / "index")
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedVectorsError, match=rf"{name} was changed since it was written"):
        VectorIndex.open(tmp_path / "index")


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("encoding", [Encoding.FLOAT32, Encoding.BINARY])
@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_condition_finds_the_nearest_of_the_rows_that_meet_it(tmp_path, kind, encoding, share):
    if kind in (Kind.IVF_PQ, Kind.CASCADE) and encoding is Encoding.BINARY:
        pytest.skip(f"{kind.value} takes no binary vectors")
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "vectors"
    path = part(folder, 0, 0, N, encoding)
    table = pyarrow.parquet.read_table(path)
    width = pyarrow.array(np.random.default_rng(3).integers(0, 1_000, N))
    table = table.add_column(1, pyarrow.field("width", width.type), width)
    pyarrow.parquet.write_table(table, path)
    index_from_vectors(folder, tmp_path / "index", kind=kind, settings=SETTINGS[kind], threads=1)
    limit = int(1_000 * share)
    meets = np.flatnonzero(width.to_numpy() < limit)
    query = VECTORS[[int(meets[0])]]
    with VectorIndex.open(tmp_path / "index") as index:
        (hits,) = index.search(query, fingerprint="space", k=5, where=[Condition.parse(f"width < {limit}")])
    assert hits[0].id == f"row {meets[0]}"
    assert len(hits) == 5
    assert all(hit.kept["width"] < limit for hit in hits)
    if kind in (Kind.FLAT, Kind.HNSW) and encoding is Encoding.FLOAT32:
        true = meets[np.argsort(-(query @ VECTORS[meets].T)[0])[:5]]
        assert [hit.id for hit in hits] == [f"row {row}" for row in true]


def test_a_condition_on_what_was_not_kept_says_how_to_keep_it(tmp_path):
    part(tmp_path / "vectors", 0, 0, 100)
    index_from_vectors(tmp_path / "vectors", tmp_path / "index")
    with VectorIndex.open(tmp_path / "index") as index:
        with pytest.raises(InputError, match=r"no column 'width'.*--keep width"):
            index.search(VECTORS[:1], fingerprint="space", where=[Condition.parse("width=3")])
        with pytest.raises(InputError, match="expected COLUMN=VALUE"):
            Condition.parse("width")


@pytest.mark.parametrize("encoding", [Encoding.FLOAT32, Encoding.FLOAT16, Encoding.INT8])
def test_a_cascade_reaches_its_recall_with_exact_scores(tmp_path, encoding):
    part(tmp_path / "vectors", 0, 0, N, encoding)
    record = index_from_vectors(tmp_path / "vectors", tmp_path / "index", kind=Kind.CASCADE, threads=1)
    recalls = [point.recall for point in record.recall.points]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert record.point is not None
    assert record.point.recall >= 0.99
    with VectorIndex.open(tmp_path / "index") as index:
        (hits,) = index.search(VECTORS[:1], fingerprint="space", k=5)
        (deep,) = index.search(VECTORS[:1], fingerprint="space", k=5, effort=N)
    exact = VECTORS[:N] @ VECTORS[0]
    tolerance = {Encoding.FLOAT32: 1e-6, Encoding.FLOAT16: 1e-3, Encoding.INT8: 2e-2}[encoding]
    for hit in (*hits, *deep):
        assert hit.score == pytest.approx(exact[int(hit.id.removeprefix("row "))], abs=tolerance)
    if encoding is Encoding.FLOAT32:
        assert [hit.id for hit in deep] == [f"row {row}" for row in np.argsort(-exact)[:5]]


def test_a_cascade_needs_more_than_bits(tmp_path):
    part(tmp_path / "vectors", 0, 0, 100, Encoding.BINARY)
    with pytest.raises(InputError, match="binary vectors have none"):
        index_from_vectors(tmp_path / "vectors", tmp_path / "index", kind=Kind.CASCADE)
