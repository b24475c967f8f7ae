"""The server's log: where a run begins in it, and which of its lines say why the run failed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EngineError

__all__ = ["RunLog", "log_of_run"]

_FAILURE = re.compile(r"[EF]\d{4} |error: |\w*(Error|Exception): |Traceback|terminate called|Aborted|Killed")
"""Start of lines that report a failure."""

_HARMLESS = re.compile(r"cuda|nvml|dcgm|gpu metrics|pinned|no cuda-capable|driver version", re.IGNORECASE)
"""Failures of a server without a GPU that stop nothing."""

_NOT_LOADED = re.compile(r"(?:failed to load|Poll failed for model directory) '([^']+)'")
_TRACE = r"\n\nAt:\n"
"""Start of a Python model's stack in a line of the log."""

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class RunLog:
    """Log file of a server.

    Attributes:
        start: Length of the file when the run began; earlier lines are of other runs.
    """

    path: Path
    start: int

    def lines(self) -> list[str]:
        """Return the lines of this run; none if the file is gone."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                return file.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def last_words(self) -> str:
        """Return the lines that report a failure, or the last lines if there are none."""
        lines = self.lines()
        failures = [
            line.partition(_TRACE)[0] for line in lines if _FAILURE.match(line) and not _HARMLESS.search(line)
        ]
        return "\n".join((failures or lines)[-_SHOWN:])

    def failed_models(self) -> list[str]:
        """Return the Triton models that the server could not load."""
        return list(dict.fromkeys(name for line in self.lines() for name in _NOT_LOADED.findall(line)))


def log_of_run(path: Path) -> RunLog:
    """Return the log of a run that is about to begin.

    Raises:
        EngineError: the file cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise EngineError(f"--log {path} is not a file. Pass the name of a file for the server's log.")
        with path.open("ab") as file:
            return RunLog(path, file.tell())
    except OSError as error:
        raise EngineError(
            f"The server's log {path} cannot be written: {error.strerror}. Choose another file."
        ) from None
