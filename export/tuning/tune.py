"""Tune the serving settings of a model: search, confirm and save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.retrieval.vectors import Progress
from export.tuning.confirmation import Confirmation, confirmation_of_loads, paired_loads
from export.tuning.evidence import Tuning, write_evidence
from export.tuning.inputs import requests_for
from export.tuning.operation import (
    ServingSettings,
    TunedFiles,
    operation_of_model,
    publish_operation,
    tuned_files,
)
from export.tuning.search import TrialLog, TuningTrial, axes_for, best_first, searched
from export.tuning.trial_server import TrialModel
from runtime.errors import ExportError
from runtime.machine import n_cores
from runtime.manifest import Manifest, Modality
from runtime.repository import staging
from runtime.server import ServerEnvironment

__all__ = ["TuneOptions", "require_tunable", "tuning_of_model"]

_FINALISTS = 2
_SLACK = 1.15
"""Tolerance of the search on the latency limit, since short measurements estimate p99 poorly."""


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Tuning settings.

    Attributes:
        p99_ms: Limit on p99 latency; that of the default configuration if None.
        minutes: Time budget. The search ends early enough for the confirmation.
        clients: Number of concurrent requests.
        seconds: Length of one load measurement.
        rounds: Paired measurements to confirm a candidate.
        source: Source of the requests; see ``requests_for``.
        writes: Save a better configuration to the repository.
    """

    p99_ms: float | None = None
    minutes: float = 10.0
    clients: int = 32
    seconds: float = 4.0
    rounds: int = 8
    source: Path | None = None
    language: str | None = None
    writes: bool = True


def require_tunable(model: Path, modality: Modality, options: TuneOptions) -> None:
    """Check what can be checked without a server: the model, its front ends and the requests.

    Raises:
        ManifestError, ExportError, InputError: as in ``tuning_of_model``.
    """
    _requests(model, Manifest.read(model), modality, options)


def _requests(
    model: Path, manifest: Manifest, modality: Modality, options: TuneOptions
) -> tuple[TunedFiles, list[bytes]]:
    files = tuned_files(model, manifest, modality)
    return files, requests_for(
        manifest, modality, files.front, source=options.source, language=options.language
    )


def tuning_of_model(
    model: Path, modality: Modality, environment: ServerEnvironment, options: TuneOptions, progress: Progress
) -> Tuning:
    """Tune ``NAME_text`` or ``NAME_image`` of ``REPOSITORY/NAME``.

    Configurations, manifest and report are written if a candidate was confirmed, only the report if none was,
    and nothing without ``options.writes``.

    Raises:
        ManifestError: the model does not exist, or its files were modified.
        ExportError: the model has no front ends, cannot be tuned, or cannot be written.
        InputError: there is nothing to send.
        EngineError: the default configuration does not start, or answers no request.
    """
    repository = model.parent
    manifest = Manifest.read(model)
    files, requests = _requests(model, manifest, modality, options)
    manifest.verify(repository, manifest.variants[manifest.front_ends[0].variant])
    manifest.verify_front_ends(repository)
    with staging(repository, "tune") as stage:
        served = TrialModel(repository, files, environment, stage, requests, options.clients)
        run = _Run(served, modality, options, progress, time.monotonic())
        tuning = run.tuning(operation_of_model(repository, files))
        if options.writes:
            if tuning.chosen is not None:
                publish_operation(model, files, tuning.chosen.candidate)
            write_evidence(tuning, repository / files.front)
    return tuning


@dataclass(slots=True)
class _Run:
    """State and timing of one tuning run."""

    served: TrialModel
    modality: Modality
    options: TuneOptions
    progress: Progress
    started: float
    startup_s: float = 0.0

    def tuning(self, default: ServingSettings) -> Tuning:
        options = self.options
        first = self._default_trial(default)
        self.startup_s = max(0.0, self._elapsed_s() - options.seconds)
        limit_ms = _SLACK * (first.p99_ms if options.p99_ms is None else options.p99_ms)
        log = TrialLog(self._measured, self._may_go_on, {default: first})
        searched(default, axes_for(self.modality, n_cores()), log, limit_ms=limit_ms)
        trials = list(log.trials.values())
        confirmations: list[Confirmation] = []
        for candidate in self._finalists(trials, first, limit_ms):
            confirmations.append(self._confirmed(first, candidate))
            if confirmations[-1].is_better(options.p99_ms) or not self._leaves(self._confirmation_s()):
                break
        self._show(done=True)
        return Tuning(
            model=self.served.files.front,
            default=default,
            trials=tuple(trials),
            confirmations=tuple(confirmations),
            p99_ms=options.p99_ms,
            setting=self._setting(),
            minutes=self._elapsed_s() / 60,
        )

    def _default_trial(self, default: ServingSettings) -> TuningTrial:
        trial = self._measured(default)
        if trial.failures:
            raise ExportError(
                f"{trial.failures} requests failed with the default configuration, so nothing can be "
                f"compared with it: {self.served.told} Send inputs that the model accepts (--texts, "
                "--images), or use fewer --clients."
            )
        return trial

    def _setting(self) -> dict[str, Any]:
        options, files = self.options, self.served.files
        return {
            "tower": files.tower,
            "engine": files.engine,
            "cores": n_cores(),
            "clients": options.clients,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "inputs": len(self.served.requests),
            "source": "samples" if options.source is None else options.source.name,
        }

    def _finalists(
        self, trials: Sequence[TuningTrial], default: TuningTrial, limit_ms: float
    ) -> list[TuningTrial]:
        """Measure the best trials of the search again, for twice as long; return them, the best first."""
        ahead = [t for t in best_first(trials, limit_ms)[: _FINALISTS + 1] if t is not default][:_FINALISTS]
        again = []
        for trial in ahead:
            if best_first([trial, default], limit_ms)[0] is default:
                continue
            again.append(self.served.trial(trial.operation, seconds=2 * self.options.seconds))
            self._show()
        return best_first(again, limit_ms)

    def _confirmed(self, default: TuningTrial, candidate: TuningTrial) -> Confirmation:
        options, served = self.options, self.served
        warm_s = options.seconds
        with (
            served.serving(default.operation, warm_s=warm_s) as one,
            served.serving(candidate.operation, warm_s=warm_s) as other,
        ):
            pairs = paired_loads(served.load, one, other, rounds=options.rounds, seconds=options.seconds)
        self._show()
        return confirmation_of_loads(candidate.operation, pairs)

    def _measured(self, operation: ServingSettings) -> TuningTrial:
        trial = self.served.trial(operation, seconds=self.options.seconds)
        self._show()
        return trial

    def _may_go_on(self) -> bool:
        """Return True if one more trial leaves time for the finalists and one confirmation."""
        trial_s = self.startup_s + self.options.seconds
        finals_s = _FINALISTS * (trial_s + self.options.seconds)
        return self._leaves(trial_s + finals_s + self._confirmation_s())

    def _confirmation_s(self) -> float:
        seconds, rounds = self.options.seconds, self.options.rounds
        return 2 * (self.startup_s + seconds) + 2 * rounds * seconds

    def _leaves(self, seconds: float) -> bool:
        """Return True if this much time is left."""
        return self._elapsed_s() + seconds < 60 * self.options.minutes

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _show(self, *, done: bool = False) -> None:
        total = int(60 * self.options.minutes)
        self.progress(self.served.files.front, total if done else min(total, int(self._elapsed_s())), total)
