"""A run on a Ray cluster whose driver is a process of its own, and the processes of that cluster.

python ray_runs.py MODEL SOURCE OUT N_WORKERS      the cluster is that of RAY_ADDRESS
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from corpus_runs import options
from sample_models import ROOT

from runtime.corpus import Columns, embed_corpus

__all__ = ["actors_of_this_process", "start_driver"]


def start_driver(
    model: Path, source: Path, out: Path, address: str, *, n_workers: int
) -> subprocess.Popen[str]:
    """Start a run on the cluster at an address."""
    return subprocess.Popen(
        [sys.executable, __file__, str(model), str(source), str(out), str(n_workers)],
        env={
            **os.environ,
            "RAY_ADDRESS": address,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def actors_of_this_process() -> list[int]:
    """Processes of the actors that hold a model, in clusters that this process started, oldest first."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            name = (folder / "cmdline").read_text()
            if name.startswith("ray::") and "Embedder" in name and _is_ours(int(folder.name)):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _is_ours(pid: int) -> bool:
    while pid > 1:
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        if pid == os.getpid():
            return True
    return False


def main() -> None:
    import ray

    from runtime.corpus.ray_runner import ray_executor

    model, source, out, n_workers = sys.argv[1:]
    ray.init(log_to_driver=False, logging_level="error")
    embed_corpus(
        model,
        source,
        out,
        options(rows_per_part=32, npy=True, columns=Columns(id="id", text="text")),
        execute=ray_executor(int(n_workers)),
    )


if __name__ == "__main__":
    main()
