"""Indexes over embedded vectors: what they find, what they say of themselves, what they refuse."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sample_models import ROOT
from vector_folders import unit_vectors, write_shard, write_vectors

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import InputError, OutputFaultError
from runtime.indexes import (
    Kind,
    OperatingPoint,
    Refinement,
    Settings,
    Space,
    VectorIndex,
    VectorShards,
    index_from_vectors,
    recall,
)
from runtime.indexes import folder as folder_module
from runtime.indexes.exact import Index, Nearest
from runtime.indexes.plan import Plan
from runtime.indexes.recall import IndexedRows, best_point, points_from_index

N, DIM = 1_500, 32
VECTORS = unit_vectors(N, DIM)
QUERIES = unit_vectors(20, DIM, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoding → folder of shards, written at its first use."""
    root = tmp_path_factory.mktemp("vectors")

    def folder_of(encoding=Encoding.FLOAT32):
        folder = root / encoding.value
        return folder if folder.is_dir() else write_vectors(folder, VECTORS, encoding=encoding)

    return folder_of


def ids(hits):
    return [[hit.id for hit in one] for one in hits]


# --- the vectors themselves -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", Encoding)
def test_a_folder_is_searched_exactly(folders, encoding):
    shards = VectorShards.open(folders(encoding))
    stored = encoded_from_float(VECTORS, encoding)
    names = tuple(f"row {i}" for i in range(N))
    whole = Index(names, stored, "space", encoding)
    queries = encoded_from_float(QUERIES, encoding)
    found = shards.search(queries, fingerprint="space", k=7)
    expected = whole.search(queries, fingerprint="space", k=7)
    scores = [[hit.score for hit in one] for one in found]
    np.testing.assert_allclose(scores, [[hit.score for hit in one] for one in expected], atol=0.01)
    if encoding is not Encoding.INT8:  # there the two scale their cosines differently
        assert ids(found) == ids(expected)


def test_rows_are_read_by_number_over_all_shards(folders):
    numbers = np.array([0, 1, 249, 250, 251, 900, N - 1])
    np.testing.assert_array_equal(VectorShards.open(folders()).rows(numbers), VECTORS[numbers])


def test_one_shard_alone_may_be_named(folders):
    shard = folders() / "part-00001.parquet"
    assert 0 < len(VectorShards.open(shard)) < N


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "other"}, ["fingerprint 'space'", "'other'"]),
        ({"vectors": unit_vectors(3, 16)}, ["width 32", "16"]),
        ({"encoding": Encoding.INT8}, ["encoding 'float32'", "'int8'"]),
        ({"ids": [1, 2, 3]}, ["type of ids 'string'", "'int64'"]),
        ({"modality": "image"}, ["modality 'text'", "'image'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_vectors_that_do_not_belong_together_are_refused(tmp_path, change, words):
    write_shard(tmp_path / "part-00000.parquet", ["a", "b", "c"], unit_vectors(3, DIM))
    encoding = change.get("encoding", Encoding.FLOAT32)
    arguments = {"ids": ["d", "e", "f"], "vectors": unit_vectors(3, DIM), **change}
    arguments["vectors"] = encoded_from_float(arguments["vectors"], encoding)
    write_shard(tmp_path / "part-00001.parquet", **arguments)
    with pytest.raises(InputError) as error:
        index_from_vectors(tmp_path, tmp_path / "index")
    for word in ["part-00000.parquet", "part-00001.parquet", *words]:
        assert word in str(error.value)
    assert not (tmp_path / "index").exists()


def test_a_folder_without_vectors_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"holds no vectors: it has no files such as part-00000\.parquet"):
        VectorShards.open(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        VectorShards.open(tmp_path / "nowhere")


def test_a_parquet_file_of_something_else_says_how_to_embed_it():
    gallery = ROOT / "samples" / "emoji" / "gallery.parquet"
    with pytest.raises(InputError, match=r"has no fingerprint.*babeltower embed"):
        VectorShards.open(gallery)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_shard_cut_short_is_named(tmp_path, kept):
    folder = write_vectors(tmp_path / "vectors", VECTORS)
    shard = folder / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * kept)])
    with pytest.raises(InputError, match=r"part-00001\.parquet cannot be read.*truncated or damaged"):
        index_from_vectors(folder, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vectors"]


@pytest.mark.parametrize(
    ("journals", "runs", "missing"),
    [
        (["journal.jsonl"], [], "run.json"),
        (
            ["journal-0-of-3.jsonl", "journal-2-of-3.jsonl"],
            ["run-0-of-3.json", "run-2-of-3.json"],
            "run-1-of-3",
        ),
    ],
)
def test_an_unfinished_run_is_not_indexed(tmp_path, journals, runs, missing):
    write_shard(tmp_path / "part-00000.parquet", ["a"], unit_vectors(1))
    for name in [*journals, *runs]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=rf"not finished.* but no {missing}.*Run the same"):
        VectorShards.open(tmp_path)


def test_a_vector_that_is_not_finite_is_an_error(tmp_path):
    vectors = unit_vectors(5)
    vectors[3, 2] = np.nan
    path = write_shard(tmp_path / "part-00000.parquet", list("abcde"), vectors)
    with pytest.raises(InputError, match="not finite"):
        index_from_vectors(path, tmp_path / "index")


def test_a_shard_that_describes_itself_wrongly_is_an_error(tmp_path):
    path = write_shard(tmp_path / "part-00000.parquet", ["a"], unit_vectors(1, 32), dim=64)
    with pytest.raises(InputError, match="claims float32 vectors of width 64"):
        VectorShards.open(path)


# --- what indexes find ------------------------------------------------------------------------------------

COMBINATIONS = [
    (kind, encoding)
    for kind in Kind
    for encoding in Encoding
    if encoding is not Encoding.BINARY or kind not in (Kind.IVF_PQ, Kind.CASCADE)
]


@pytest.mark.parametrize(("kind", "encoding"), COMBINATIONS)
def test_every_row_is_found_under_its_id(folders, tmp_path, kind, encoding):
    """Those too that were held out while the index was measured."""
    record = index_from_vectors(folders(encoding), tmp_path / "index", kind=kind, threads=1)
    assert record.n_rows == N
    assert record.recall.n_queries == N // 10
    with VectorIndex.open(tmp_path / "index") as index:
        stored = encoded_from_float(VECTORS, encoding)
        found = index.search(stored, fingerprint="space", k=3, effort=64 if record.effort else None)
    best = [one[0] for one in found]
    assert np.mean([hit.id == f"row {i}" for i, hit in enumerate(best)]) > 0.99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize("encoding", Encoding)
def test_a_flat_index_finds_and_scores_as_comparing_with_all(folders, tmp_path, encoding):
    record = index_from_vectors(folders(encoding), tmp_path / "index", threads=1)
    assert [point.recall for point in record.recall.points] == [1.0]
    shards = VectorShards.open(folders(encoding))
    expected = shards.search(QUERIES, fingerprint="space", k=10)
    with VectorIndex.open(tmp_path / "index") as index:
        found = index.search(QUERIES, fingerprint="space", k=10)
    scores = np.array([[hit.score for hit in one] for one in found])
    np.testing.assert_allclose(scores, [[hit.score for hit in one] for one in expected], atol=2e-6)
    if encoding is not Encoding.BINARY:  # whose scores are equal for many rows
        assert ids(found) == ids(expected)


@pytest.mark.parametrize(
    ("kind", "settings", "bytes_per_row"),
    [
        (Kind.FLAT, Settings(), 4 * DIM),
        (Kind.HNSW, Settings(n_neighbours=8), 4 * DIM + 4 * 16),
        (Kind.IVF_PQ, Settings(n_lists=16, code_bytes=8, refine=Refinement.NONE), 8 + 8),
        (Kind.IVF_PQ, Settings(n_lists=16, code_bytes=8, refine=Refinement.FLOAT16), 8 + 8 + 2 * DIM),
    ],
)
def test_settings_reach_the_index(folders, tmp_path, kind, settings, bytes_per_row):
    record = index_from_vectors(folders(), tmp_path / "index", kind=kind, settings=settings, threads=1)
    assert record.size_bytes == sum(
        path.stat().st_size for path in (tmp_path / "index").iterdir() if path.name != "index.json"
    )
    fixed = 256 * 4 * DIM + 16 * 4 * DIM + 16_384  # codebooks, centroids and heads
    assert bytes_per_row * N < record.file_bytes["index.faiss"] < 1.3 * bytes_per_row * N + fixed


def test_refining_finds_more(folders, tmp_path):
    recalls = {}
    for refine in Refinement:
        settings = Settings(refine=refine, code_bytes=4, n_lists=8, effort=8)
        record = index_from_vectors(
            folders(), tmp_path / refine.value, kind=Kind.IVF_PQ, settings=settings, threads=1
        )
        recalls[refine] = record.point.recall
    assert recalls[Refinement.NONE] < recalls[Refinement.INT8] <= recalls[Refinement.FLOAT16] + 0.01


def test_one_seed_gives_one_index(folders, tmp_path):
    contents = []
    for name in ("one", "two"):
        index_from_vectors(folders(), tmp_path / name, kind=Kind.IVF_PQ, seed=5, threads=1)
        contents.append((tmp_path / name / "index.faiss").read_bytes())
    assert contents[0] == contents[1]


def test_threads_search_one_index_at_once(folders, tmp_path):
    index_from_vectors(folders(), tmp_path / "index", kind=Kind.HNSW, threads=1)
    with VectorIndex.open(tmp_path / "index") as index, ThreadPoolExecutor(4) as pool:
        expected = index.search(QUERIES, fingerprint="space", effort=200)

        def search(effort):
            index.search(QUERIES, fingerprint="space", effort=effort)
            return index.search(QUERIES, fingerprint="space", effort=200)

        assert all(ids(found) == ids(expected) for found in pool.map(search, [10, 20, 50, 400] * 5))


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11])
def test_few_rows_are_enough_for_a_flat_index(tmp_path, n):
    write_shard(tmp_path / "part-00000.parquet", list(range(n)), unit_vectors(n, DIM))
    record = index_from_vectors(tmp_path, tmp_path / "index")
    assert n == 1 or record.recall.k == min(10, n - 1)
    assert bool(record.recall.points) == (n > 1)
    with VectorIndex.open(tmp_path / "index") as index:
        (found,) = index.search(unit_vectors(n, DIM)[:1], fingerprint="space", k=20)
    assert found[0].id == "0"
    assert len(found) == n


# --- what is measured -------------------------------------------------------------------------------------


def planted(monkeypatch, shards, rows_found):
    """Points of an index that answers with the rows that it is told to."""
    monkeypatch.setattr(recall, "neighbours", lambda *_, **__: (None, rows_found(recall_queries(shards))))
    queries = recall_queries(shards)
    nearest = Nearest(len(queries), 10)
    for block in shards.blocks():
        nearest.see(queries @ block.vectors.T)
    plan = Plan.of(Kind.FLAT, shards.space, settings=Settings(), n_rows=len(shards), seed=0)
    everything = IndexedRows(shards, np.empty(0, dtype=np.int64))
    return points_from_index(None, plan, queries, nearest, everything, effort=None)


def recall_queries(shards):
    return unit_vectors(40, shards.space.dim, seed=9)


@pytest.mark.parametrize("n_right", [0, 3, 10])
def test_the_recall_that_is_reported_is_the_share_found(folders, monkeypatch, n_right):
    def rows_found(queries):
        order = np.argsort(-(queries @ VECTORS.T), axis=1)
        return np.hstack([order[:, :n_right], order[:, 500 : 510 - n_right]])

    (point,) = planted(monkeypatch, VectorShards.open(folders()), rows_found)
    assert point.recall == pytest.approx(n_right / 10)
    assert point.search_ms > 0


def test_missing_answers_count_as_not_found(folders, monkeypatch):
    def rows_found(queries):
        order = np.argsort(-(queries @ VECTORS.T), axis=1)[:, :10]
        order[:, 4:] = -1
        return order

    (point,) = planted(monkeypatch, VectorShards.open(folders()), rows_found)
    assert point.recall == pytest.approx(0.4)


def test_a_row_as_good_as_the_tenth_is_found_right(tmp_path, monkeypatch):
    """Texts that many rows share: any of the equal rows is a true neighbour."""
    vectors = np.repeat(unit_vectors(20, DIM, seed=3), 30, axis=0)
    shards = VectorShards.open(write_vectors(tmp_path / "vectors", vectors))

    def other_twins(queries):
        best = np.argmax(queries @ vectors[::30].T, axis=1) * 30
        return best[:, None] + np.arange(20, 30)

    (point,) = planted(monkeypatch, shards, other_twins)
    assert point.recall == 1.0


def test_rows_are_numbered_without_those_held_out(folders):
    held_out = np.array([0, 3, 4, 700])
    kept = np.delete(np.arange(N), held_out)
    rows = IndexedRows(VectorShards.open(folders()), held_out)
    numbers = np.array([0, 1, 2, 695, 696, 697, N - 5])
    np.testing.assert_array_equal(rows.vectors(numbers), VECTORS[kept[numbers]])


def test_queries_of_their_own_may_be_measured_with(folders, tmp_path):
    asked = write_shard(tmp_path / "queries.parquet", [str(i) for i in range(20)], QUERIES)
    record = index_from_vectors(folders(), tmp_path / "index", queries=asked)
    assert (record.recall.n_queries, record.recall.queries) == (20, str(asked))
    other = write_shard(tmp_path / "other.parquet", ["a"], QUERIES[:1], fingerprint="elsewhere")
    with pytest.raises(InputError, match=r"from another space.*elsewhere"):
        index_from_vectors(folders(), tmp_path / "second", queries=other)


def test_the_effort_is_the_least_that_is_enough():
    points = [OperatingPoint(2**i, found, 0.1, 10) for i, found in enumerate([0.5, 0.9, 0.97, 0.9704])]
    assert best_point(points, 0.85).effort == 2
    assert best_point(points, 0.99).effort == 4  # nothing reaches it, and 8 is no better than 4


def test_an_effort_that_was_asked_for_is_kept(folders, tmp_path):
    settings = Settings(effort=3, n_lists=20)
    record = index_from_vectors(folders(), tmp_path / "index", kind=Kind.IVF_PQ, settings=settings)
    assert record.effort == 3
    assert [point.effort for point in record.recall.points] == [3]


# --- what is refused --------------------------------------------------------------------------------------


def test_too_few_rows_to_train_are_an_error_with_a_remedy(tmp_path):
    folder = write_vectors(tmp_path / "vectors", unit_vectors(200))
    with pytest.raises(InputError, match=r"180 rows are too few to train.*at least 256.*flat or hnsw"):
        index_from_vectors(folder, tmp_path / "index", kind=Kind.IVF_PQ)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("kind", "encoding", "settings", "message"),
    [
        (Kind.FLAT, Encoding.FLOAT32, Settings(n_lists=4), "n_lists is not a setting of a flat index"),
        (Kind.HNSW, Encoding.FLOAT32, Settings(code_bytes=4), "code_bytes is not a setting of a hnsw"),
        (Kind.FLAT, Encoding.FLOAT32, Settings(effort=4), "effort is not a setting of a flat index"),
        (Kind.IVF_PQ, Encoding.FLOAT32, Settings(code_bytes=5), r"does not divide the width 32.*16, 32"),
        (Kind.IVF_PQ, Encoding.FLOAT32, Settings(n_lists=1400), "too few to train"),
        (Kind.IVF_PQ, Encoding.FLOAT32, Settings(n_lists=0), "n_lists is 0"),
        (Kind.IVF_PQ, Encoding.BINARY, Settings(), "cannot compress binary vectors"),
    ],
)
def test_settings_that_do_not_fit_are_errors(folders, tmp_path, kind, encoding, settings, message):
    with pytest.raises(InputError, match=message):
        index_from_vectors(folders(encoding), tmp_path / "index", kind=kind, settings=settings)


def test_an_index_larger_than_the_memory_is_refused_at_once(folders, tmp_path, monkeypatch):
    small = tmp_path / "meminfo"
    small.write_text("MemTotal: 900 kB\nMemAvailable: 100 kB\n")
    monkeypatch.setattr("runtime.machine._MEMINFO", small)
    with pytest.raises(InputError, match=r"hnsw index of 1,500 rows needs .* GB of memory.*ivf-pq"):
        index_from_vectors(folders(), tmp_path / "index", kind=Kind.HNSW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fingerprint": "other"}, "holds vectors of space 'space', but the queries are from 'other'"),
        ({"queries": unit_vectors(1, 16)}, r"float32 \(1, 16\); expected float32 \(n, 32\)"),
        ({"queries": QUERIES.astype(np.float64)}, "float64"),
        ({"queries": np.full((1, DIM), np.inf, np.float32)}, "not finite"),
        ({"k": 0}, "k is 0"),
        ({"effort": 0}, "effort 0"),
        ({"effort": 5}, "flat index, so every row is compared"),
    ],
)
def test_queries_that_do_not_fit_are_errors(folders, tmp_path, options, message):
    index_from_vectors(folders(), tmp_path / "index")
    arguments = {"queries": QUERIES, "fingerprint": "space", **options}
    with VectorIndex.open(tmp_path / "index") as index, pytest.raises(InputError, match=message):
        index.search(arguments.pop("queries"), **arguments)


@pytest.mark.parametrize("encoding", Encoding)
def test_only_the_direction_of_a_query_counts(encoding):
    space = Space("space", DIM, encoding)
    np.testing.assert_allclose(
        space.decoded_queries(5 * QUERIES), space.decoded_queries(QUERIES), rtol=1e-5, atol=1e-7
    )


# --- folders ----------------------------------------------------------------------------------------------


def test_an_index_is_replaced_only_when_that_is_asked_for(folders, tmp_path):
    out = tmp_path / "index"
    index_from_vectors(folders(), out)
    with pytest.raises(InputError, match=r"already holds an index\. Pass --replace"):
        index_from_vectors(folders(), out, kind=Kind.HNSW)
    index_from_vectors(folders(), out, kind=Kind.HNSW, replace=True)
    with VectorIndex.open(out) as index:
        assert index.record.kind == "hnsw"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize("replace", [False, True])
def test_something_else_is_never_replaced(folders, tmp_path, replace):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(InputError, match="exists and is not an index"):
        index_from_vectors(folders(), tmp_path / "photos", replace=replace)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_a_folder_that_cannot_be_written_is_named(folders, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"inside cannot be written .*choose another folder"):
        index_from_vectors(folders(), tmp_path / "file" / "inside")


def test_a_failed_build_leaves_the_old_index(folders, tmp_path, monkeypatch):
    out = tmp_path / "index"
    index_from_vectors(folders(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.IdsFile, "write", full_disk)
    with pytest.raises(OutputFaultError, match="No space left"):
        index_from_vectors(folders(), out, kind=Kind.HNSW, replace=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "cascade"])
def test_a_disk_that_takes_no_more_ends_the_command_with_the_code_of_faults(folders, tmp_path, kind):
    command = [
        sys.executable,
        "-m",
        "runtime.commands",
        "index",
        str(folders()),
        "--out",
        str(tmp_path / "i"),
    ]
    done = subprocess.run(
        [*command, "--kind", kind, "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["adding", "measuring", "writing"])
def test_a_killed_build_leaves_no_index_and_the_next_one_cleans_up(folders, tmp_path, step):
    out = tmp_path / "index"
    code = (
        "import os, signal\n"
        "from runtime.indexes import index_from_vectors\n"
        f"kill = lambda step, done, of: os.kill(os.getpid(), signal.SIGKILL) if step == {step!r} else None\n"
        f"index_from_vectors({str(folders())!r}, {str(out)!r}, threads=1, progress=kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -9
    assert not out.exists()
    index_from_vectors(folders(), out, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def damaged(out, name, how):
    path = out / name
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, **how}))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("index.json", "missing", r"holds no index: there is no index\.json"),
        ("index.json", "short", "cannot be read"),
        ("index.json", {"version": 99}, "has version 99"),
        ("index.json", {"kind": "psychic"}, "is not an index record"),
        ("index.json", {"dim": "wide"}, "is not an index record"),
        ("index.json", {"n_rows": 7}, "1,500 vectors, 1,500 ids and a record of 7"),
        ("index.faiss", "missing", r"index\.faiss has no bytes"),
        ("index.faiss", "short", "truncated"),
        ("ids.arrow", "short", r"ids\.arrow has \d+ bytes"),
    ],
)
def test_a_damaged_index_is_not_opened(folders, tmp_path, name, how, message):
    index_from_vectors(folders(), tmp_path / "index")
    damaged(tmp_path / "index", name, how)
    with pytest.raises(InputError, match=message):
        VectorIndex.open(tmp_path / "index")


def test_files_of_the_right_size_and_wrong_content_are_errors(folders, tmp_path):
    index_from_vectors(folders(), tmp_path / "index")
    for name in ("index.faiss", "ids.arrow"):
        path = tmp_path / "index" / name
        before = path.read_bytes()
        path.write_bytes(b"x" * len(before))
        with pytest.raises(InputError, match="Build the index again"):
            VectorIndex.open(tmp_path / "index")
        path.write_bytes(before)


def test_no_index_is_written_where_there_is_no_folder(folders, tmp_path):
    deep = tmp_path / "a" / "b" / "index"
    index_from_vectors(folders(), deep)
    assert Path(deep / "index.json").is_file()
