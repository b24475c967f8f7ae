"""A run on a Ray cluster of several nodes on this machine, which join and leave while it runs.

    python ray_cluster.py MODEL SOURCE OUT N_CHANGES

Prints how many nodes joined and were killed before the run ended, and how many of them held a model.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from corpus_runs import options
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from runtime.corpus import embed_corpus
from runtime.corpus.ray_runner import ray_executor

_STORE_BYTES = 150 << 20


def _n_parts(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def _holds_a_model(node_id: str) -> bool:
    return any(actor.node_id == node_id and actor.state == "ALIVE" for actor in list_actors())


def change(cluster: Cluster, out: Path, n_changes: int, is_done: threading.Event, seen: list[str]) -> None:
    """Let nodes join; kill each once it holds a model and parts were written since."""
    while len(seen) < n_changes and not is_done.is_set():
        before = _n_parts(out)
        node = cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES)
        while not is_done.is_set() and not (_holds_a_model(node.node_id) and _n_parts(out) > before):
            time.sleep(0.2)
        if is_done.is_set():
            return
        seen.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)


def main() -> None:
    """Run the job beside the changes of its cluster."""
    model, source, out, n_changes = sys.argv[1:]
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": _STORE_BYTES}
    )
    ray.init(address=cluster.address, log_to_driver=False)
    is_done, seen = threading.Event(), []
    arguments = (cluster, Path(out), int(n_changes), is_done, seen)
    thread = threading.Thread(target=change, args=arguments)
    thread.start()
    try:
        record = embed_corpus(model, source, out, options(rows_per_part=50), execute=ray_executor())
    finally:
        is_done.set()
        thread.join()
    print(record.total.rows, len(seen))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
