"""Output in an object store equals that on a disk, whatever is killed, by one worker or by several."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from corpus_runs import N_KILLS, bytes_of, options, write_gapped
from log_lines import logged_lines
from object_stores import BUCKET, s3_server
from sample_models import ROOT, Exported
from typer.testing import CliRunner

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from runtime.commands.app import app
from runtime.corpus import embed_corpus
from runtime.corpus.stores import store_from_location
from runtime.corpus.stores.objects import ObjectStore
from runtime.errors import CorpusError

N_ROWS = 640
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gapped(tmp_path_factory.mktemp("source"), N_ROWS)


@pytest.fixture(scope="module")
def server():
    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3(server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield fsspec.filesystem("s3", use_listings_cache=False)
    fsspec.filesystem("s3").clear_instance_cache()


def start(model, source, out, server, *fault):
    script = str(ROOT / "tests" / "support" / "killed_runs.py")
    paths = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(
        [sys.executable, script, str(model), str(source), out, *map(str, fault)],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **server},
        stderr=subprocess.PIPE,
        text=True,
    )


def objects(s3, prefix: str) -> dict[str, bytes]:
    """Every file of vectors, arrays and bad rows below a prefix."""
    found = s3.find(f"{BUCKET}/{prefix}")
    return {
        path.removeprefix(f"{BUCKET}/{prefix}/"): s3.cat_file(path)
        for path in found
        if path.endswith((".parquet", ".npy"))
    }


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """What a run on a disk writes that nothing stops, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.perf_counter()
    process = start(model, source, str(out), {})
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 0)
    return bytes_of(out), time.perf_counter() - started


def test_workers_that_are_killed_and_come_again(model, source, server, s3, whole):
    """Two at a time, each killed at a random moment, until the folder is whole."""
    expected, seconds = whole
    chance = random.Random(11)
    out, prefix = f"s3://{BUCKET}/killed", "killed"
    n_killed = 0
    while n_killed < N_KILLS:
        workers = [start(model, source, out, server) for _ in range(2)]
        for worker in workers:
            time.sleep(chance.uniform(0.2, 0.7) * seconds)
            worker.kill()
        for worker in workers:
            worker.communicate()
            n_killed += worker.returncode == KILLED
        if all(worker.returncode == 0 for worker in workers):
            assert objects(s3, prefix) == expected
            s3.rm(f"{BUCKET}/{prefix}", recursive=True)
    last = [start(model, source, out, server) for _ in range(2)]
    for worker in last:
        _, errors = worker.communicate(timeout=300)
        assert (worker.returncode, errors) == (0, "")
    assert objects(s3, prefix) == expected


def test_the_commands_write_and_read_a_url(model, source, s3, tmp_path):
    url = f"s3://{BUCKET}/commands"
    arguments = ["--language", "en", "--engine", "onnxruntime", "--precision", "fp32", "--threads", "1"]
    sizes = ["--instances", "1", "--rows-per-part", "200"]
    done = CliRunner().invoke(app, ["embed", str(model), str(source), "--out", url, *arguments, *sizes])
    assert done.exit_code == 0, done.output
    assert not (Path.cwd() / "s3:").exists()
    status = CliRunner().invoke(app, ["status", url, "--json"])
    found = json.loads(status.stdout)
    assert (found["is_finished"], found["rows"], found["bad"]) == (True, N_ROWS, 2)
    assert found["bad_kinds"] == {"null-text": 2}
    verified = CliRunner().invoke(app, ["verify", url])
    assert verified.exit_code == 0, verified.output
    (part,) = s3.glob(f"{BUCKET}/commands/part-00001.parquet")
    data = bytearray(s3.cat_file(part))
    data[len(data) // 2] ^= 1
    s3.pipe_file(part, bytes(data))
    verified = CliRunner().invoke(app, ["verify", url])
    assert verified.exit_code == 65
    assert "part-00001.parquet was changed" in verified.output
    s3.rm_file(part)
    again = CliRunner().invoke(app, ["embed", str(model), str(source), "--out", url, *arguments, *sizes])
    assert again.exit_code == 0, again.output
    assert CliRunner().invoke(app, ["verify", url]).exit_code == 0


def test_of_many_that_create_one_object_one_succeeds(s3):
    stores = [store_from_location(f"s3://{BUCKET}/race") for _ in range(8)]
    for turn in range(5):
        ready = threading.Barrier(len(stores))
        won: list[int] = []

        def create(number: int, ready=ready, won=won, turn=turn) -> None:
            ready.wait()
            if stores[number].create(f"turn-{turn}", f"worker {number}".encode()):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert stores[0].read(f"turn-{turn}") == f"worker {won[0]}".encode()


def test_a_large_object_is_created_once(s3):
    """In several parts, as one of 70 MB is sent."""
    store = store_from_location(f"s3://{BUCKET}/large")
    content = bytes(70 << 20)
    written = store.publish("part", lambda path: path.write_bytes(content))
    assert written is not None
    assert store.publish("part", lambda path: path.write_bytes(content[:5])) is None
    assert store.names()["part"] == written.n_bytes == 70 << 20


def test_a_store_without_conditional_writes_says_so():
    class Careless(type(fsspec.filesystem("memory"))):
        def pipe_file(self, path, value, mode="overwrite", **options):
            super().pipe_file(path, value, mode="overwrite")

    store = ObjectStore(Careless(), "/careless", "memory://careless")
    with logged_lines() as lines:
        ObjectStore(fsspec.filesystem("memory"), "/careful", "memory://ok").require_conditional_writes("p")
        assert lines == []
        store.require_conditional_writes("probe")
    assert lines == ["memory://careless has no conditional writes; let one process at a time write to it"]


def test_a_folder_of_any_fsspec_file_system(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "disk", options())
    embed_corpus(model, source, "memory://folder", options())
    memory = fsspec.filesystem("memory")
    for name, data in bytes_of(tmp_path / "disk").items():
        assert memory.cat_file(f"/folder/{name}") == data
    assert embed_corpus(model, source, "memory://folder", options()).this_run.rows == 0


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (Path("s3://bucket/folder"), r"looks like a URL that was made a path.*s3://…"),
        ("s3://", "names no folder; expected s3://BUCKET/FOLDER|cannot be opened"),
        ("nowhere://bucket/folder", "cannot be opened"),
    ],
)
def test_an_output_that_is_no_folder_is_an_error(out, message):
    with pytest.raises(CorpusError, match=message):
        store_from_location(out)
