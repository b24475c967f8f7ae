"""Cost of opening a graph: bytes on disk, resident memory, CPU time to load."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np

from bench.models.speed_artefacts import Artefact
from bench.records.record import Record, artefact_sha256, record_of
from runtime.backends import open_backend

__all__ = ["footprint_of"]

_REPEATS = 3


def footprint_of(artefact: Artefact, tower: str) -> list[Record]:
    """Open a text tower's graph in fresh processes, embed one text of 16 tokens, and measure."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        seen = [pool.apply(_open_and_run, (artefact,)) for _ in range(_REPEATS)]
    n_bytes = [sum(file.stat().st_size for file in artefact.files)]
    sha256 = artefact_sha256(*artefact.files)
    columns: dict[str, tuple[str, list[float]]] = {
        "on disk": ("MB", [n / 1e6 for n in n_bytes]),
        "resident": ("GB", [resident / 1e9 for resident, _ in seen]),
        "CPU time to load": ("s", [seconds for _, seconds in seen]),
    }
    settings = {"engine": artefact.engine.value, "threads": 1, "repeats": _REPEATS}
    cells = [({"tower": tower, "footprint": name}, *column) for name, column in columns.items()]
    return [
        record_of(cell, values, unit=unit, settings=settings, artefact=sha256) for cell, unit, values in cells
    ]


def _open_and_run(artefact: Artefact) -> tuple[int, float]:
    """Return this process's resident bytes after one run, and CPU seconds to open the graph."""
    started = time.process_time()
    backend = open_backend(artefact.engine, artefact.graph, precision=artefact.precision, threads=1)
    seconds = time.process_time() - started
    ids = np.arange(3, 19, dtype=np.int64)[None]
    backend.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ["vector"])
    resident_kb = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    backend.close()
    return resident_kb * 1024, seconds
