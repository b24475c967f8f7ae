"""On Ray, nodes come and go, actors and drivers are killed, and the output is that of one run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_runs import N_KILLS, bytes_of, emptied, options, write_gapped
from processes import actors_of_this_process
from sample_models import Exported
from workers import start_worker

from runtime.corpus import Columns, embed_corpus

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

N_ROWS = 960
KILLED = -signal.SIGKILL
_STORE_BYTES = 120 << 20
_MOST_NODES = 3


class ElasticCluster:
    """Cluster of a head with one CPU, and up to three more nodes of one CPU."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_health_check_period_ms", "1000")  # a killed node is noticed in seconds
        os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves its workers
        self.cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
            },
        )
        self.nodes: list[object] = []

    def join(self) -> None:
        """Add a node."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES))

    def leave(self, number: int) -> None:
        """Kill all processes of a node."""
        self.cluster.remove_node(self.nodes.pop(number), allow_graceful=False)


@pytest.fixture
def elastic():
    cluster = ElasticCluster()
    yield cluster
    cluster.cluster.shutdown()


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


def grown(out: Path, driver: subprocess.Popen[str], n_parts: int) -> bool:
    """Wait until a run has written some more parts; False if it ended."""
    aim = len(list(out.glob("part-*.parquet"))) + n_parts
    deadline = time.monotonic() + 1_200
    while driver.poll() is None and len(list(out.glob("part-*.parquet"))) < aim:
        assert time.monotonic() < deadline, "no part was written for twenty minutes"
        time.sleep(0.05)
    return driver.poll() is None


def test_nodes_join_and_leave_while_actors_and_drivers_are_killed(elastic, model, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", elastic.cluster.address)
    source = write_gapped(tmp_path, N_ROWS)
    out = tmp_path / "out"
    columns = Columns(id="id", text="text")
    embed_corpus(model, source, tmp_path / "whole", options(rows_per_part=32, npy=True, columns=columns))
    expected = bytes_of(tmp_path / "whole")
    chance, done = random.Random(3), Counter[str]()

    def kill_actor() -> bool:
        actors = actors_of_this_process()
        if actors:
            os.kill(chance.choice(actors), signal.SIGKILL)
        return bool(actors)

    def kill_node() -> bool:
        has_nodes = bool(elastic.nodes)
        if has_nodes:
            elastic.leave(chance.randrange(len(elastic.nodes)))
        return has_nodes

    def kill_driver() -> bool:
        driver.kill()
        driver.communicate()
        return driver.returncode == KILLED

    acts: dict[str, Callable[[], bool]] = {"actor": kill_actor, "node": kill_node, "driver": kill_driver}
    driver = start_worker(model, source, out, ray=_MOST_NODES)
    while done.total() < max(1, N_KILLS // 2):
        if len(elastic.nodes) < _MOST_NODES and chance.random() < 0.7:
            elastic.join()
        if grown(out, driver, chance.randrange(1, 9)):
            name = chance.choice(list(acts))
            done[name] += acts[name]()
        if driver.poll() is not None:
            if driver.returncode != KILLED:
                assert driver.returncode == 0, driver.communicate()[1]
                assert bytes_of(out) == expected
                emptied(out)
            driver = start_worker(model, source, out, ray=_MOST_NODES)
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0, errors
    assert bytes_of(out) == expected
