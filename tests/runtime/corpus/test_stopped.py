"""Whatever stops a run, the same run goes on, and its output equals that of a run that nothing stopped."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_runs import N_KILLS, bytes_of, emptied, journal_of, output_of, write_gapped
from sample_models import ROOT, Exported

N_ROWS = 640
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gapped(tmp_path_factory.mktemp("source"), N_ROWS)


def start(model, source, out, *fault, limit=None):
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "killed_runs.py"),
        str(model),
        str(source),
        str(out),
    ]
    return subprocess.Popen(
        [*command, *map(str, fault)],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def finish(model, source, out, *fault, limit=None):
    process = start(model, source, out, *fault, limit=limit)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """What a run that nothing stops writes, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.perf_counter()
    assert finish(model, source, out) == (0, "")
    ids, _ = output_of(out)
    assert len(ids) == len(set(ids)) == N_ROWS - 2
    return bytes_of(out), time.perf_counter() - started


def test_killed_again_and_again(model, source, whole, tmp_path):
    """At random moments, in the middle of syncs, links and renames, and by a disk that is full."""
    expected, seconds = whole
    chance = random.Random(5)
    out, n_stopped = tmp_path / "out", 0
    while n_stopped < N_KILLS:
        how = chance.choice(("moment", "moment", "step", "full"))
        if how == "moment":
            process = start(model, source, out)
            time.sleep(chance.uniform(0.3, 1.0) * seconds)
            process.kill()
            _, errors = process.communicate()
            code = process.returncode
        elif how == "step":
            step, when = chance.choice(("fsync", "link", "replace")), chance.choice(("before", "after"))
            code, errors = finish(model, source, out, step, chance.randrange(1, 40), when)
        else:
            code, errors = finish(model, source, out, limit=limited(chance.choice((300, 5_000))))
        if code == 0:  # it was done before the kill
            assert errors == ""
            assert bytes_of(out) == expected
            emptied(out)
        else:
            assert code == KILLED or "run the same command again" in errors
            n_stopped += 1
    assert finish(model, source, out) == (0, "")
    assert bytes_of(out) == expected


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["fsync", "link"])
def test_killed_at_each_step_to_the_disk(model, source, whole, tmp_path, step, when):
    """Every few calls: before a sync, a rename or a link, after it, between file and journal."""
    expected, _ = whole
    codes = [finish(model, source, tmp_path / "out", step, count, when)[0] for count in (1, 2, 3, 5, 8, 4)]
    assert codes[:4] == [KILLED] * 4
    assert set(codes[4:]) <= {KILLED, 0}  # how many calls are left depends on what was under way before
    assert finish(model, source, tmp_path / "out") == (0, "")
    assert bytes_of(tmp_path / "out") == expected
    done = [entry["done"]["part"] for entry in journal_of(tmp_path / "out") if "done" in entry]
    assert sorted(done) == list(range(N_ROWS // 32))


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_heartbeat_and_record(model, source, whole, tmp_path, when):
    """A worker's own file is replaced: as it starts, as it names its computation; the record at the end."""
    expected, _ = whole
    for count in (1, 2, 3):
        assert finish(model, source, tmp_path / "out", "replace", count, when)[0] == KILLED
    assert finish(model, source, tmp_path / "out") == (0, "")
    assert bytes_of(tmp_path / "out") == expected


def limited(n_bytes):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("n_bytes", [300, 5_000])
def test_a_disk_that_takes_no_more(model, source, whole, tmp_path, n_bytes):
    """No file may grow past a few bytes: first not even the journal, then no part."""
    expected, _ = whole
    code, errors = finish(model, source, tmp_path / "out", limit=limited(n_bytes))
    assert code == 1
    assert "cannot be written" in errors
    assert "run the same command again" in errors
    assert not list((tmp_path / "out").glob(".*.part"))
    assert finish(model, source, tmp_path / "out") == (0, "")
    assert bytes_of(tmp_path / "out") == expected


def test_journal_entries_that_were_cut_short(model, source, whole, tmp_path):
    """As a power cut leaves them where the file system names a file before its content is there."""
    expected, _ = whole
    code, _ = finish(model, source, tmp_path / "out", "link", 30, "after")
    assert code == KILLED
    entries = sorted((tmp_path / "out" / "_journal").glob("part-*.json"))
    for path in entries[-2:]:
        path.write_bytes(path.read_bytes()[:9])
    assert finish(model, source, tmp_path / "out") == (0, "")
    assert bytes_of(tmp_path / "out") == expected
    assert N_ROWS in [entry.get("end") for entry in json_entries(tmp_path / "out")]


def json_entries(out):
    found = []
    for path in (out / "_journal").glob("run.*.json"):
        found.append(json.loads(path.read_text()))
    return found


def test_a_full_file_system(model, source, whole, tmp_path):
    """A file system of a quarter of a megabyte fills up; once there is room, the run goes on."""
    expected, _ = whole
    out = tmp_path / "small"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        code, errors = finish(model, source, out)
        assert code == 1
        assert "cannot be written" in errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        assert finish(model, source, out) == (0, "")
        assert bytes_of(out) == expected
    finally:
        subprocess.run(["umount", str(out)], check=True)
