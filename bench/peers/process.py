"""Client of a peer's process: sends commands, reads answers; a dead process is an error too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.models.samples import ROOT
from runtime.errors import BabeltowerError

__all__ = ["PeerError", "PeerProcess"]

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+")
_WORKER = Path(__file__).resolve().parent / "isolated" / "worker.py"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_ONE_THREAD = {**dict.fromkeys(_THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class PeerError(BabeltowerError):
    """Error that a peer answered, in its own words."""


class PeerProcess:
    """One interpreter with one peer's loop; use it as a context manager.

    Args:
        sees_project: Put this project on the interpreter's path, which only babeltower itself needs.
    """

    def __init__(
        self, python: Path, loop: str, *, worker: Path = _WORKER, sees_project: bool = False
    ) -> None:
        self._loop = loop
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close()
        environment = {**os.environ, **_ONE_THREAD, **_OFFLINE}
        environment.pop("PYTHONPATH", None)
        if sees_project:
            environment["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(
            [str(python), str(worker), loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
        )

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """True if the process still runs."""
        return self._process.poll() is None

    def open(self, key: str, task: Mapping[str, Any]) -> None:
        """Open a model under a key.

        Raises:
            PeerError: the peer cannot open it.
        """
        self._ask(do="open", key=key, task=dict(task))

    def vectors(self, key: str, inputs: Path) -> NDArray[np.float32]:
        """Return the vectors of an input file's rows.

        Raises:
            PeerError: the peer failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vectors.npy"
            self._ask(do="run", key=key, inputs=str(inputs), vectors=str(file))
            found: NDArray[np.float32] = np.load(file)
        return found

    def seconds(self, key: str, inputs: Path, n_runs: int) -> tuple[float, float]:
        """Return CPU seconds (of all of the process's threads) and wall seconds of ``n_runs`` runs.

        Raises:
            PeerError: the peer failed.
        """
        answer = self._ask(do="time", key=key, inputs=str(inputs), runs=n_runs)
        return float(answer["cpu_s"]), float(answer["wall_s"])

    def close(self) -> None:
        """End the process; may be called again."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    def _ask(self, **command: Any) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            raise PeerError(f"the process of {self._loop} ended ({self._last_words()})")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(_without_folders(answer["error"]))
        ok: Mapping[str, Any] = answer["ok"]
        return ok

    def _last_words(self) -> str:
        code = self._process.wait(timeout=10)
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        return f"exit code {code}; {_without_folders(lines[-1]) if lines else 'no message'}"


def _without_folders(message: str) -> str:
    """Shorten absolute paths to their last parts, so that a record does not show its machine."""
    return _PATH.sub("…/", message)
