"""A worker of a folder in a process of its own, for tests that kill, stop or race several.

    python workers.py MODEL SOURCE OUT [NAME=VALUE...]

Options: rows_per_part, lease_s, measured (no engine is given, so the first worker measures), cpu (the
processor's name is another), stop_before_finish (stops itself once, when its first part's files are written),
ray (number of actors on the cluster that RAY_ADDRESS names; this process is the driver).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from corpus_runs import options
from sample_models import ROOT

from runtime.corpus import Columns, EngineChoice, embed_corpus
from runtime.corpus import run as run_module
from runtime.corpus.computation import ComputationChange, computation_of
from runtime.corpus.journal import Journal

__all__ = ["start_worker"]


def start_worker(model: Path, source: Path, out: object, **chosen: object) -> subprocess.Popen[str]:
    """Start a worker; options as of the module's docstring."""
    return subprocess.Popen(
        [sys.executable, __file__, str(model), str(source), str(out)]
        + [f"{name}={value}" for name, value in chosen.items()],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _stop_before_first_finish() -> None:
    finish = Journal.finish

    def stopping(self: Journal, record: object) -> bool:
        Journal.finish = finish  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGSTOP)
        return finish(self, record)  # type: ignore[arg-type]

    Journal.finish = stopping  # type: ignore[assignment,method-assign]


def main() -> None:
    model, source, out, *words = sys.argv[1:]
    chosen = dict(word.split("=", 1) for word in words)
    changes: dict[str, object] = {"rows_per_part": int(chosen.get("rows_per_part", 32)), "npy": True}
    changes["columns"] = Columns(id="id", text="text")
    changes["lease_s"] = float(chosen.get("lease_s", 60))
    if "measured" in chosen:
        changes["engine"] = EngineChoice()
    if "cpu" in chosen:
        run_module.computation_of = lambda *given: {**computation_of(*given), "cpu": chosen["cpu"]}
    if "accept" in chosen:
        changes["accept_changed"] = (ComputationChange(chosen["accept"]),)
    if "stop_before_finish" in chosen:
        _stop_before_first_finish()
    execute = None
    if "ray" in chosen:
        from runtime.corpus.ray_runner import ray_executor

        execute = ray_executor(int(chosen["ray"]))
    record = embed_corpus(model, source, out, options(**changes), execute=execute)
    print(record.this_run.rows, record.total.rows)


if __name__ == "__main__":
    main()
