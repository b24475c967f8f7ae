"""Tuning report: JSON, a Markdown table, a plot of throughput against latency."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.tuning.confirmation import Confirmation
from export.tuning.operation import ServingSettings
from export.tuning.search import TuningTrial
from runtime.errors import ExportError
from runtime.storage import replace_file, replace_text

__all__ = ["Tuning", "write_evidence"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Results of a tuning run.

    Attributes:
        model: Name of the front end.
        trials: Trials of the search in order of measurement, the default first.
        confirmations: Confirmations of the finalists, up to the first that was better.
        p99_ms: Requested latency limit; None for that of the default configuration.
        setting: Settings of the run, as plain values.
    """

    model: str
    default: ServingSettings
    trials: tuple[TuningTrial, ...]
    confirmations: tuple[Confirmation, ...]
    p99_ms: float | None
    setting: Mapping[str, Any]
    minutes: float

    @property
    def chosen(self) -> Confirmation | None:
        """Confirmed candidate; None if the default is best."""
        return next((c for c in self.confirmations if c.is_better(self.p99_ms)), None)

    @property
    def limit_ms(self) -> float:
        """Requested latency limit, or the default's 99th percentile in the search."""
        return self.trials[0].p99_ms if self.p99_ms is None else self.p99_ms

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.model,
            **self.setting,
            "minutes": round(self.minutes, 2),
            "p99_limit_ms": self.p99_ms,
            "default": asdict(self.default),
            "chosen": None if self.chosen is None else asdict(self.chosen.candidate),
            "confirmations": [
                {
                    "candidate": asdict(c.candidate),
                    "rates": [list(pair) for pair in c.rates],
                    "ratio": c.ratio,
                    "interval": list(c.interval),
                    "p99_ms": list(c.p99_ms),
                    "failures": list(c.failures),
                    "is_better": c.is_better(self.p99_ms),
                }
                for c in self.confirmations
            ],
            "trials": [asdict(trial) for trial in self.trials],
        }

    def summary(self) -> list[str]:
        """Return the lines of a summary for the terminal."""
        default = self.trials[0]
        lines = [
            f"{self.model}: {len(self.trials)} configurations tried in {self.minutes:.1f} minutes",
            f"default    {default.operation}: {default.rate:.0f} requests/s, p99 {default.p99_ms:.0f} ms",
        ]
        lines += [f"candidate  {_confirmation_line(c)}" for c in self.confirmations]
        if self.chosen is None:
            lines.append("The default is best; nothing was changed.")
        else:
            lines.append(f"chosen     {self.chosen.candidate}")
        return lines

    def as_markdown(self) -> str:
        """Render all trials and the rounds of the confirmations."""
        chosen = None if self.chosen is None else self.chosen.candidate
        lines = [f"# Tuning of {self.model}", "", _setting_line(self.setting), ""]
        lines += ["| configuration | requests/s | p50 ms | p99 ms | |", "|---|---|---|---|---|"]
        for trial in self.trials:
            mark = "default" if trial.operation == self.default else ""
            mark = "chosen" if trial.operation == chosen else mark
            mark = mark or ("" if trial.holds(self.limit_ms) else "over the limit")
            lines.append(
                f"| {trial.operation} | {trial.rate:.1f} | {trial.p50_ms:.1f} | {trial.p99_ms:.1f} | {mark} |"
            )
        for found in self.confirmations:
            lines += ["", f"Candidate {_confirmation_line(found)}", ""]
            lines += ["| round | default, requests/s | candidate, requests/s | ratio |", "|---|---|---|---|"]
            lines += [
                f"| {i + 1} | {default:.1f} | {rate:.1f} | {rate / default:.3f} |"
                for i, (default, rate) in enumerate(found.rates)
            ]
        lines += ["", self.summary()[-1]]
        return "\n".join(lines) + "\n"


def write_evidence(tuning: Tuning, stem: Path) -> Sequence[Path]:
    """Write ``STEM.tuning.json``, ``.md`` and ``.png``; each is renamed into place when complete.

    Raises:
        ExportError: the files cannot be written.
    """
    paths = [stem.with_name(f"{stem.name}.tuning.{suffix}") for suffix in ("json", "md", "png")]
    try:
        replace_text(paths[0], json.dumps(tuning.as_json(), indent=2) + "\n")
        replace_text(paths[1], tuning.as_markdown())
        replace_file(paths[2], lambda unfinished: _plot(tuning, unfinished))
    except OSError as error:
        raise ExportError(f"The tuning report cannot be written beside {stem}: {error}.") from error
    return paths


def _plot(tuning: Tuning, path: Path) -> None:
    """Plot one point per configuration, with the latency limit as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [t.p99_ms for t in tuning.trials], [t.rate for t in tuning.trials], color="0.6", label="tried"
    )
    default = tuning.trials[0]
    axes.scatter([default.p99_ms], [default.rate], color="black", label="default")
    for trial in tuning.trials:
        if tuning.chosen is not None and trial.operation == tuning.chosen.candidate:
            axes.scatter([trial.p99_ms], [trial.rate], marker="*", s=160, label=f"chosen: {trial.operation}")
    axes.axvline(tuning.limit_ms, color="black", linewidth=0.8, linestyle=":", label="p99 latency limit")
    axes.set_xlabel("p99 latency, ms")
    axes.set_ylabel("requests per second")
    axes.set_title(f"{tuning.model}, {tuning.setting['clients']} clients, {tuning.setting['cores']} cores")
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _confirmation_line(found: Confirmation) -> str:
    low, high = found.interval
    return (
        f"{found.candidate}: {found.ratio:.2f}× the default ({low:.2f} to {high:.2f} in {len(found.rates)} "
        f"rounds), p99 {found.p99_ms[1]:.0f} ms, default's {found.p99_ms[0]:.0f} ms"
    )


def _setting_line(setting: Mapping[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()) + "."
