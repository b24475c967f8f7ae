"""On Ray the output is the local run's to the byte, also when workers die."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from altered_models import computing_otherwise, copied, graph_of, overwritten
from corpus_runs import bytes_of, options, sentences, write_texts
from processes import actors_of_this_process
from sample_models import Exported

from runtime.corpus import embed_corpus
from runtime.errors import CorpusError
from runtime.manifest import Modality
from samples import dataset

ray = pytest.importorskip("ray")

from runtime.corpus.ray_runner import ray_executor  # noqa: E402


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",  # never a cluster that another program left its name of
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three files, whose rows are no multiples of a part's."""
    folder = tmp_path_factory.mktemp("source")
    texts = sentences(1_000)
    texts[77] = None
    for i, (start, stop) in enumerate(((0, 310), (310, 330), (330, 1_000))):
        write_texts(folder / f"{i}.parquet", texts[start:stop], id=[f"t{k}" for k in range(start, stop)])
    return folder


def test_the_output_is_the_local_runs(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "local", options())
    record = embed_corpus(model, source, tmp_path / "ray", options(), execute=ray_executor(2))
    assert record.this_run.rows == 1_000
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "local")
    assert embed_corpus(model, source, tmp_path / "ray", options()).this_run.rows == 0


def test_images_and_lines(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, drawing in enumerate(dataset.load_gallery()[:40]):
        (folder / f"{i % 30:02d}-{i}.png").write_bytes(drawing.png)
    (folder / "bad.png").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("\n".join(sentences(200)))
    for name, source in (("images", folder), ("lines", tmp_path / "a.txt")):
        out = tmp_path / "out" / name
        embed_corpus(model, source, out / "local", options(rows_per_part=24))
        embed_corpus(model, source, out / "ray", options(rows_per_part=24), execute=ray_executor(2))
        assert bytes_of(out / "ray") == bytes_of(out / "local")


def test_an_iterable_stays_here(model, tmp_path):
    with pytest.raises(CorpusError, match="cannot read a Python iterable"):
        embed_corpus(model, ["a", "b"], tmp_path / "out", options(), execute=ray_executor(1))


def killed_while_running(n_kills: int, out: Path, n_parts: int) -> tuple[threading.Thread, list[int]]:
    """A thread that kills an actor once some parts are written, waits for its successor, and kills again."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(killed) < n_kills and time.monotonic() < deadline:
            fresh = [pid for pid in actors_of_this_process() if pid not in killed]
            if fresh and len(list(out.glob("part-*.parquet"))) >= n_parts:
                os.kill(fresh[-1], signal.SIGKILL)
                killed.append(fresh[-1])
                time.sleep(1.5)
            time.sleep(0.05)

    return threading.Thread(target=kill), killed


@pytest.mark.parametrize(
    ("n_workers", "n_kills", "n_rows", "n_parts"),
    [(2, 1, 4_000, 0), pytest.param(4, 2, 40_000, 4, marks=pytest.mark.slow)],
)
def test_workers_that_are_killed(model, tmp_path, n_workers, n_kills, n_rows, n_parts):
    source = write_texts(tmp_path / "a.parquet", sentences(n_rows))
    embed_corpus(model, source, tmp_path / "local", options(rows_per_part=500))
    thread, killed = killed_while_running(n_kills, tmp_path / "ray", n_parts)
    thread.start()
    embed_corpus(model, source, tmp_path / "ray", options(rows_per_part=500), execute=ray_executor(n_workers))
    thread.join()
    assert len(killed) == n_kills
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: overwritten(graph_of(model, Modality.TEXT)), r"model\.onnx has sha256"),
        (
            lambda model: computing_otherwise(model, Modality.TEXT),
            "does not reproduce PyTorch's vectors on this",
        ),
    ],
    ids=["damaged", "computes otherwise"],
)
def test_a_worker_proves_its_own_copy(damage, message, model, source, tmp_path):
    """The driver's is right: a worker's machine has another copy, or another CPU."""
    own = copied(model, tmp_path / "own")

    def execute(job):
        damage(own)
        yield from ray_executor(1)(job)

    with pytest.raises(CorpusError, match=rf"The worker on .* cannot embed: .*{message}"):
        embed_corpus(own, source, tmp_path / "out", options(), execute=execute)
    assert not list((tmp_path / "out").glob("part-*"))
