"""Run test servers of a model with different serving settings, from a staging folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.tuning.load_generator import Load, load_of_server
from export.tuning.operation import ServingSettings, TunedFiles, write_operation
from export.tuning.search import TuningTrial
from runtime.cosines import row_cosines
from runtime.errors import ExportError
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server
from runtime.triton_config import CONFIG_FILE

__all__ = ["TrialModel", "linked_folder", "trial_of_load"]

_MIN_COSINE = 0.999
"""Minimum cosine between vectors of one input under two configurations, which differ only by rounding."""


@dataclass(slots=True)
class TrialModel:
    """Launcher of test servers, each with its own configuration in ``stage`` and shared weight files.

    Attributes:
        requests: Requests that clients send repeatedly.
        clients: Number of concurrent requests.
        told: Error message of a failed request, if any.
    """

    repository: Path
    files: TunedFiles
    environment: ServerEnvironment
    stage: Path
    requests: Sequence[bytes]
    clients: int
    told: str = ""
    _seen: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _started: int = 0

    @contextlib.contextmanager
    def serving(self, operation: ServingSettings, *, warm_s: float) -> Iterator[Server]:
        """Start a server with a configuration, warmed up for ``warm_s`` seconds."""
        self._started += 1
        repository = self.stage / f"trial-{self._started}"
        repository.mkdir()
        for folder in (self.files.front, self.files.tower):
            linked_folder(self.repository / folder, repository / folder)
        write_operation(repository, self.files, operation)
        options = ServerOptions(models=(self.files.tower, self.files.front))
        try:
            with running_server(repository, environment=self.environment, options=options) as server:
                self.load(server, warm_s)
                yield server
        finally:
            shutil.rmtree(repository, ignore_errors=True)

    def load(self, server: Server, seconds: float | None) -> Load:
        """Measure a server under load for some seconds, or for each request once if None.

        Raises:
            ExportError: an input's vector differs from that under another configuration.
            EngineError: no request is answered.
        """
        load = load_of_server(server.addresses.grpc, self.requests, clients=self.clients, seconds=seconds)
        self.told = next(iter(load.failures), self.told)
        for i, vector in load.vectors.items():
            cosine = float(row_cosines(self._seen.setdefault(i, vector)[None], vector[None])[0])
            if not cosine >= _MIN_COSINE:
                raise ExportError(
                    f"Request {i} got a different vector than before (cosine {cosine:.4f}), but serving "
                    "settings must not change results. Check the model with `babeltower inspect`."
                )
        return load

    def trial(self, operation: ServingSettings, *, seconds: float) -> TuningTrial:
        """Start a server with a configuration and measure it under load."""
        with self.serving(operation, warm_s=max(1.0, seconds / 3)) as server:
            return trial_of_load(operation, self.load(server, seconds))


def trial_of_load(operation: ServingSettings, load: Load) -> TuningTrial:
    """Summarise a load measurement as a trial."""
    return TuningTrial(
        operation, load.rate, load.percentile_ms(50), load.percentile_ms(99), sum(load.failures.values())
    )


def linked_folder(source: Path, target: Path) -> None:
    """Copy a Triton model folder with links to its files; only ``config.pbtxt`` is a writable copy."""

    def link(original: str, copy: str) -> None:
        if Path(original).name == CONFIG_FILE:
            shutil.copyfile(original, copy)
            return
        try:
            os.link(original, copy)
        except OSError:
            Path(copy).symlink_to(Path(original).resolve())

    shutil.copytree(
        source, target, copy_function=link, ignore=shutil.ignore_patterns("__pycache__", ".*.part")
    )
