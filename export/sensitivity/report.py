"""Report of the quantization costs by product and trial: JSON, a Markdown table, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.sensitivity.costs import ProductCost
from export.sensitivity.trials import Trial
from runtime.errors import ExportError

__all__ = ["SensitivityReport", "write_report"]


@dataclass(frozen=True, slots=True)
class SensitivityReport:
    """All measurements used to choose the products kept in FP32.

    Attributes:
        costs: Cost of every product, in descending order.
        trials: Trials by ascending number of kept products.
        chosen: Trial whose products are kept; None if none met the limits.
        setting: Settings, data sets and limits, as plain values.
    """

    model: str
    engine: str
    costs: tuple[ProductCost, ...]
    trials: tuple[Trial, ...]
    chosen: Trial | None
    setting: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with drops as shares."""
        return {
            "model": self.model,
            "engine": self.engine,
            **self.setting,
            "kept": None if self.chosen is None else _names(self.chosen),
            "products": [
                {
                    "tower": cost.product.modality.value,
                    "product": cost.product.name,
                    "share_of_operations": cost.share,
                    "expected_turned": cost.turned,
                    "mean_cosine": cost.cosine,
                }
                for cost in self.costs
            ],
            "trials": [
                {
                    "n_kept": len(trial.kept),
                    "kept": _names(trial),
                    "share_int8": trial.share_int8,
                    "mean_recall_drop": trial.mean_drop,
                    "worst_recall_drop": trial.worst_drop,
                    "worst_language": trial.worst_language,
                    "pairs_per_core_second": trial.pairs_per_core_second,
                    "failures": list(trial.failures),
                }
                for trial in self.trials
            ],
        }

    def as_markdown(self) -> str:
        """Render both tables, with drops in points."""
        lines = [f"# INT8 of {self.model} on {self.engine}", "", _setting_line(self.setting), ""]
        lines += [
            "| kept in FP32 | INT8 share | mean drop of R@1 | worst language | pairs/core-second | limits |",
            "|---|---|---|---|---|---|",
        ]
        for trial in self.trials:
            chosen = " (chosen)" if trial is self.chosen else ""
            lines.append(
                f"| {len(trial.kept)}{chosen} | {trial.share_int8:.1%} | {100 * trial.mean_drop:.2f} "
                f"| {100 * trial.worst_drop:.2f} {trial.worst_language} | {trial.pairs_per_core_second:.0f} "
                f"| {'broken' if trial.failures else 'hold'} |"
            )
        lines += [
            "",
            "Each product alone in INT8, the costliest first:",
            "",
            "| tower | product | share of operations | neighbours expected to change | mean cosine | kept |",
            "|---|---|---|---|---|---|",
        ]
        kept = set() if self.chosen is None else set(self.chosen.kept)
        for cost in self.costs:
            lines.append(
                f"| {cost.product.modality.value} | `{cost.product.name}` | {cost.share:.1%} "
                f"| {cost.turned:.2%} | {cost.cosine:.6f} | {'yes' if cost.product in kept else ''} |"
            )
        return "\n".join(lines) + "\n"


def write_report(report: SensitivityReport, stem: Path) -> tuple[Path, ...]:
    """Write ``STEM.json``, ``STEM.md`` and ``STEM.svg``; return their paths.

    Raises:
        ExportError: the files cannot be written.
    """
    paths = tuple(stem.parent / f"{stem.name}.{suffix}" for suffix in ("json", "md", "svg"))
    try:
        _write(report, paths)
    except OSError as error:
        raise ExportError(
            f"The report cannot be written to {stem.parent}: {error}. Pass another path with --report."
        ) from error
    return paths


def _write(report: SensitivityReport, paths: tuple[Path, ...]) -> None:
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(report.as_markdown(), encoding="utf-8")
    _plot(report, paths[2])


def _plot(report: SensitivityReport, path: Path) -> None:
    """Plot recall drop against speed; each point is labelled with its number of kept products."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    speeds = [trial.pairs_per_core_second for trial in report.trials]
    for drops, label, mark in (
        ([100 * trial.mean_drop for trial in report.trials], "mean over the languages", "o"),
        ([100 * trial.worst_drop for trial in report.trials], "worst language", "^"),
    ):
        axes.scatter(speeds, drops, marker=mark, label=label)
    for trial, speed in zip(report.trials, speeds, strict=True):
        axes.annotate(
            f"{len(trial.kept)}", (speed, 100 * trial.mean_drop), xytext=(4, 4), textcoords="offset points"
        )
    if report.chosen is not None:
        axes.axvline(report.chosen.pairs_per_core_second, linewidth=0.8, linestyle=":", label="chosen")
    limit = 100 * float(report.setting["max_recall_drop"])
    axes.axhline(limit, linewidth=0.8, color="black", label=f"limit of the mean, {limit:g} points")
    axes.set_xlabel("text–image pairs embedded per core-second")
    axes.set_ylabel("R@1 drop relative to PyTorch, points")
    axes.set_title(f"{report.model} in INT8 on {report.engine}: products kept in FP32")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _names(trial: Trial) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for product in trial.kept:
        found.setdefault(product.modality.value, []).append(product.name)
    return found


def _setting_line(setting: Mapping[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in _flat(setting)) + "."


def _flat(setting: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    return [(name, value) for name, value in setting.items() if not isinstance(value, Mapping)]
