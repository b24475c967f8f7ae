"""Any number of processes share one folder: they come and go, and the output is that of one run."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from corpus_runs import N_KILLS, bytes_of, emptied, options, write_gapped
from log_lines import logged_lines
from sample_models import Exported
from typer.testing import CliRunner
from workers import start_worker

from runtime import storage
from runtime.commands.app import app
from runtime.corpus import EngineChoice, Shard, embed_corpus
from runtime.corpus.folder.leases import Fleet, worker_file
from runtime.corpus.journal import Journal, state_of_store
from runtime.corpus.stores import store_from_location
from runtime.errors import CorpusError, DamagedVectorsError, InputError, UnfinishedRunError
from runtime.indexes import VectorShards

N_ROWS = 640
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gapped(tmp_path_factory.mktemp("source"), N_ROWS)


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """What one worker writes, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.perf_counter()
    assert ended(start_worker(model, source, out)) == (0, f"{N_ROWS} {N_ROWS}\n", "")
    return bytes_of(out), time.perf_counter() - started


def ended(worker, timeout=300):
    output, errors = worker.communicate(timeout=timeout)
    return worker.returncode, output, errors


def until(condition, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the awaited state was not reached"
        time.sleep(0.02)


def stopped(worker) -> bool:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_workers_come_and_go_and_are_killed(model, source, whole, tmp_path):
    expected, seconds = whole
    chance = random.Random(7)
    out, n_killed, workers = tmp_path / "out", 0, []
    while n_killed < N_KILLS:
        if any(worker.poll() is not None for worker in workers):  # a worker ends once the folder is whole
            assert {ended(worker)[0] for worker in workers} == {0}
            assert bytes_of(out) == expected
            emptied(out)
            workers = []
        while len(workers) < 3:
            workers.append(start_worker(model, source, out))
        time.sleep(chance.uniform(0.1, 0.5) * seconds)
        victim = workers.pop(chance.randrange(len(workers)))
        victim.kill()
        n_killed += ended(victim)[0] == KILLED
    rows = [ended(worker) for worker in workers]
    assert all(code == 0 and errors == "" for code, _, errors in rows)
    assert ended(start_worker(model, source, out))[0] == 0
    assert bytes_of(out) == expected
    CliRunner().invoke(app, ["verify", str(out)], catch_exceptions=False)
    assert not list((out / "_journal").glob("worker-*"))


def test_a_worker_that_was_taken_for_dead_publishes_nothing(model, source, whole, tmp_path):
    """It stops when its first part is written but not recorded, and wakes when another worker has done it."""
    expected, _ = whole
    slow = start_worker(model, source, tmp_path, lease_s=2, stop_before_finish=1)
    until(lambda: stopped(slow))
    assert ended(start_worker(model, source, tmp_path, lease_s=2))[:2] == (0, f"{N_ROWS} {N_ROWS}\n")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    os.kill(slow.pid, signal.SIGCONT)
    code, output, errors = ended(slow)
    assert (code, output) == (0, f"0 {N_ROWS}\n")
    assert errors == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")} == written
    assert bytes_of(tmp_path) == expected


def test_six_workers_take_what_the_first_one_measured(model, source, tmp_path):
    workers = [start_worker(model, source, tmp_path, measured=1) for _ in range(6)]
    found = [ended(worker) for worker in workers]
    assert [(code, errors) for code, _, errors in found] == [(0, "")] * 6
    assert sum(int(output.split()[0]) for _, output, _ in found) == N_ROWS
    assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 0


def test_a_worker_that_computes_otherwise_is_refused_unless_asked_for(model, source, tmp_path):
    embed_corpus(model, source, tmp_path, options(shard=Shard(0, 2), rows_per_part=32))
    (tmp_path / "none").mkdir()
    code, _, errors = ended(start_worker(model, source, tmp_path, cpu="another"))
    assert code == 1
    assert "cpu was" in errors or "arguments" in errors


def test_a_run_that_could_not_start_does_not_block_its_folder(model, source, tmp_path):
    def fails(job):
        raise CorpusError("stopped before the first part")

    with pytest.raises(CorpusError, match="before the first part"):
        embed_corpus(model, source, tmp_path / "out", options(rows_per_part=32), execute=fails)
    record = embed_corpus(model, source, tmp_path / "out", options(rows_per_part=64))
    assert record.total.rows == N_ROWS
    with pytest.raises(InputError):
        embed_corpus(model, source, tmp_path / "new", options(dim=7))
    assert not (tmp_path / "new").exists()


def test_files_that_a_run_left_without_a_record_are_replaced(model, source, whole, tmp_path):
    """A part was written, its worker killed before the record; then with other arguments."""
    (tmp_path / "part-00003.parquet").write_bytes(b"left behind")
    (tmp_path / "_bad-rows").mkdir()
    (tmp_path / "_bad-rows" / "part-00000.parquet").write_bytes(b"left behind")
    assert ended(start_worker(model, source, tmp_path))[0] == 0
    left = bytes_of(tmp_path).keys() - whole[0].keys()
    assert left <= {"_bad-rows/part-00000.parquet"}
    if left:
        assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 65


@pytest.mark.parametrize("lacking", ["link", "fsync of folders", "flock"])
def test_a_file_system_that_lacks_something(model, source, whole, tmp_path, monkeypatch, lacking):
    import fcntl

    def not_supported(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    real = os.fsync

    def sync_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    storage._warn_once.cache_clear()
    if lacking == "link":
        monkeypatch.setattr(os, "link", not_supported)
    elif lacking == "flock":
        monkeypatch.setattr(fcntl, "flock", not_supported)
    else:
        monkeypatch.setattr(os, "fsync", sync_files_only)
    with logged_lines() as lines:
        embed_corpus(model, source, tmp_path / "out", options(rows_per_part=32, npy=True))
    assert set(bytes_of(tmp_path / "out")) == set(whole[0])
    if lacking == "link":
        assert any("has no hard links" in line for line in lines)
    elif lacking != "flock":
        assert any("cannot sync folders" in line for line in lines)
    else:
        assert lines == []


def test_a_heartbeat_that_ends_frees_a_workers_parts_after_the_lease(tmp_path):
    """Of a worker on another machine nothing is known but its file."""
    store = store_from_location(tmp_path)
    other = {"host": "elsewhere", "boot": "another", "beat": 1, "lease_s": 1.0}
    store.replace(worker_file("far"), json.dumps(other).encode())
    fleet = Fleet(store, lease_s=1.0)
    assert fleet.is_alive("far")
    assert not fleet.is_alive("gone")
    for beat in range(2, 6):  # it goes on for longer than a lease
        time.sleep(0.6)
        store.replace(worker_file("far"), json.dumps({**other, "beat": beat}).encode())
        assert fleet.is_alive("far")
    until(lambda: not fleet.is_alive("far"), timeout=30)


def test_of_two_claims_one_is_granted_and_a_dead_workers_is_free(tmp_path):
    store = store_from_location(tmp_path)
    first, second = Journal(store, lease_s=1.0), Journal(store, lease_s=1.0)
    with second:
        with first:
            assert first.known_arguments() is None
            first.agree({"rows_per_part": 10})
            assert second.known_arguments() == {"rows_per_part": 10}
            assert first.claim(0)
            assert first.claim(0)
            second.begin_pass()
            assert not second.claim(0)
            assert second.claim(1)
            assert not first.claim(1)
        second.begin_pass()
        assert second.claim(0)
        assert first.holds(0) is False
    assert state_of_store(store).held.keys() == {0, 1}


def test_status_tells_parts_rows_bad_rows_and_workers(model, source, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, [*arguments, "--json"])

    empty = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert (empty.exit_code, "holds no output of babeltower embed" in empty.output) == (1, True)
    embed_corpus(model, source, tmp_path, options(rows_per_part=32, shard=Shard(0, 2)))
    found = json.loads(invoke("status", str(tmp_path)).stdout)
    assert (found["is_finished"], found["parts_done"], found["n_parts"]) == (False, 10, 20)
    unfinished = invoke("verify", str(tmp_path))
    assert unfinished.exit_code == 75
    with pytest.raises(UnfinishedRunError, match=r"10 of 20 parts are missing, the first is part-00001"):
        VectorShards.open(tmp_path)
    embed_corpus(model, source, tmp_path, options(rows_per_part=32, shard=Shard(1, 2)))
    found = json.loads(invoke("status", str(tmp_path)).stdout)
    assert (found["is_finished"], found["rows"], found["bad_kinds"]) == (True, N_ROWS, {"null-text": 2})
    text = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "20 of 20 done" in text
    assert invoke("verify", str(tmp_path)).exit_code == 0


def damage(folder: Path, how: str) -> str:
    part = folder / "part-00002.parquet"
    if how == "missing":
        part.unlink()
    elif how == "stray":
        (folder / "part-00099.parquet").write_bytes(part.read_bytes())
        return "part-00099.parquet"
    elif how == "short":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        data = bytearray(part.read_bytes())
        data[int(how) if int(how) >= 0 else len(data) + int(how)] ^= 4
        part.write_bytes(data)
    return part.name


@pytest.fixture(scope="module")
def finished(model, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    embed_corpus(model, source, out, options(rows_per_part=160))
    return bytes_of(out), out


@pytest.mark.parametrize("how", ["missing", "stray", "short", "10", "5000", "-300"])
def test_index_search_and_verify_name_the_damaged_file(model, finished, tmp_path, how):
    import shutil

    shutil.copytree(finished[1], tmp_path / "out")
    name = damage(tmp_path / "out", how)
    with pytest.raises(DamagedVectorsError, match=name):
        VectorShards.open(tmp_path / "out")
    for command in (
        ["index", str(tmp_path / "out"), "--out", str(tmp_path / "index")],
        ["search", str(model), str(tmp_path / "out"), "gato", "--language", "en"],
        ["verify", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 65, result.output
        assert name in result.output


def test_an_engine_that_is_named_joins_what_was_measured(model, source, tmp_path):
    embed_corpus(model, source, tmp_path, options(engine=EngineChoice(), shard=Shard(0, 2)))
    record = embed_corpus(model, source, tmp_path, options(engine=EngineChoice(), shard=Shard(1, 2)))
    assert record.total.rows == N_ROWS - 320
