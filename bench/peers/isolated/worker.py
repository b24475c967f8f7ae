"""Process of a peer: reads one JSON command per line and answers each with one JSON line.

    ENVIRONMENT/bin/python worker.py LOOP

- ``{"do": "open", "key": …, "task": {…}}``: open a model with ``loops/LOOP.py``.
- ``{"do": "run", "key": …, "inputs": NPZ, "vectors": NPY}``: run once and write the vectors.
- ``{"do": "time", "key": …, "inputs": NPZ, "runs": N}``: run N times; answer seconds of CPU and wall time.

An answer is ``{"ok": {…}}``, or ``{"error": "…"}`` after any exception. Output of the library goes to
standard error. No package of the suite is imported, so that every peer can have its own versions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Mapping[str, Any]], Any]


class Worker:
    """Opened models of one loop, by key, and the inputs read so far, by file."""

    def __init__(self, opened: Callable[[Mapping[str, Any]], Run]) -> None:
        self._opened = opened
        self._runs: dict[str, Run] = {}
        self._inputs: dict[str, Mapping[str, Any]] = {}

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Execute a command; an exception becomes an error."""
        try:
            return {"ok": getattr(self, f"_{command['do']}")(command)}
        except Exception as error:
            return {"error": _one_line(error)}

    def _open(self, command: Mapping[str, Any]) -> dict[str, Any]:
        self._runs[command["key"]] = self._opened(command["task"])
        return {}

    def _run(self, command: Mapping[str, Any]) -> dict[str, Any]:
        vectors = self._runs[command["key"]](self._read(command["inputs"]))
        np.save(command["vectors"], np.asarray(vectors, dtype=np.float32))
        return {}

    def _time(self, command: Mapping[str, Any]) -> dict[str, Any]:
        run, inputs = self._runs[command["key"]], self._read(command["inputs"])
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(command["runs"]):
            run(inputs)
        return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}

    def _read(self, file: str) -> Mapping[str, Any]:
        if file not in self._inputs:
            with np.load(file) as arrays:
                found: dict[str, Any] = dict(arrays)
            for name in ("texts", "files"):
                if name in found:
                    found[name] = [str(item) for item in found[name]]
            self._inputs[file] = found
        return self._inputs[file]


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[0] = str(Path(__file__).resolve().parent)
    worker: Worker | None = None
    for line in sys.stdin:
        if worker is None:
            try:
                worker = Worker(importlib.import_module(f"loops.{sys.argv[1]}").opened)
            except Exception as error:
                print(json.dumps({"error": _one_line(error)}), file=answers, flush=True)
                continue
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
