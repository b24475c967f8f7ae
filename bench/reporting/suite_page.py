"""Page of all results: sections of tables, plots, tiles and pictures, rendered into one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.records.record import Record
from bench.records.statistics import bootstrap_median_interval
from bench.reporting.languages import language_rows, tiles_by_script
from bench.reporting.plots import (
    drop_plot,
    latency_plot,
    load_plot,
    roofline_plot,
    throughput_plot,
    trials_plot,
)
from bench.reporting.suite_data import Results, Run
from bench.timing.roofline import peaks_from_records
from bench.timing.speed_cells import cells_by_shape, verdicts_of_cells
from runtime.errors import BabeltowerError

__all__ = ["page_from_results"]

_TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True, slots=True)
class SuiteVerdict:
    """Verdict of one gate: its requirement, the measured result, and its outcome."""

    gate: str
    found: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """SVG with a caption."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class RunSection:
    """Plots and tables of one run; ``missing`` names each part without records, and its command."""

    name: str
    versions: str
    plots: tuple[Plot, ...]
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...]
    missing: tuple[tuple[str, str], ...]


def page_from_results(results: Results) -> str:
    """Render the page; styles, script, plots and pictures are inline."""
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = language_rows(results.precisions)
    return templates.get_template("suite.html.j2").render(
        verdicts=list(_verdicts(results)),
        runs=[_run_section(run) for run in results.runs],
        languages=rows,
        tiles=tiles_by_script(rows),
        drops=list(_drop_plots(results)),
        turned=results.turned,
        files=results.files,
    )


def _verdicts(results: Results) -> Iterator[SuiteVerdict]:
    for record in results.precisions:
        yield from _precision_verdicts(record)
    for report in results.retrieval:
        verdict, model = report["verdict"], report["model"]
        found = "; ".join(verdict["failures"][:2]) or "every language within the limits"
        yield SuiteVerdict(
            f"{model['name']} {model['precision']} on {model['engine']} retrieves as PyTorch does, "
            f"{report['dataset']}",
            found,
            verdict["passed"],
        )
    for run in results.runs:
        for (tower, shape), forms in cells_by_shape(run.records).items():
            for target, measured, by, holds in verdicts_of_cells(tower, forms):
                yield SuiteVerdict(f"{tower}, {shape}: {target}", f"{measured} by {by}", holds)


def _precision_verdicts(record: Mapping[str, Any]) -> Iterator[SuiteVerdict]:
    for row in record["rows"]:
        limits = record["limits"][row["variant"].split("_")[0]]["retrieval"]
        sides = [row[side] for side in ("text_to_image", "image_to_text")]
        mean = max(side["mean_drop_points"] for side in sides)
        worst = max(sides, key=lambda side: float(side["worst_drop_points"]))
        holds = mean <= 100 * limits["max_mean_drop"] + 1e-3
        holds &= worst["worst_drop_points"] <= 100 * max(limits["max_recall_drop"], 0.001) + 1e-3
        allowed = [100 * limits[name] for name in ("max_mean_drop", "max_recall_drop")]
        yield SuiteVerdict(
            f"{row['model']} {row['variant']} on {row['engine']}: R@1 falls by at most {allowed[0]:.1f} in "
            f"the mean and {allowed[1]:.1f} in any language",
            f"{max(mean, 0):.2f} in the mean, {worst['worst_drop_points']:.2f} in {worst['worst_language']}",
            holds,
        )


def _drop_plots(results: Results) -> Iterator[Plot]:
    for record in results.precisions:
        if svg := drop_plot(record["rows"], "Recall lost by each variant"):
            yield Plot(svg, "R@1 lost by each variant, all captions; FP32 loses nothing.")
    for report in results.sensitivity:
        title = f"Trade-off of {report['model']} on {report['engine']}"
        if svg := trials_plot(report, title):
            yield Plot(svg, f"{title}: products kept in FP32, the limit dashed.")


def _run_section(run: Run) -> RunSection:
    latency, throughput, server, peers = (run.of(s) for s in ("latency", "throughput", "server", "peers"))
    plots, missing = list(_speed_plots(latency, throughput, server, run)), []
    if not latency:
        missing.append(("Latency", "python bench/latency.py --json FILE"))
    if not throughput:
        missing.append(("Throughput", "python bench/throughput.py --json FILE"))
    if not peers:
        missing.append(("Peers", "python -m bench.peers --json FILE"))
    tables = [table for table in (_full_size_table(run), _peer_table(peers), _other_table(run)) if table[2]]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return RunSection(run.name, versions, tuple(plots), tuple(tables), tuple(missing))


def _speed_plots(
    latency: Sequence[Record], throughput: Sequence[Record], server: Sequence[Record], run: Run
) -> Iterator[Plot]:
    wall = [r for r in latency if r.cell["metric"] == "wall"]
    for model in dict.fromkeys(r.cell["model"] for r in wall):
        here = [r for r in wall if r.cell["model"] == model]
        if svg := latency_plot(here, f"Latency of {model}"):
            yield Plot(svg, f"{model}: median time of a batch, one thread.")
    try:
        peaks = peaks_from_records(run.records)
    except BabeltowerError:
        peaks = None
    if peaks is not None and (svg := roofline_plot(latency, peaks, "Roofline")):
        yield Plot(svg, "Every measured shape under the limits of this machine, one thread.")
    for model in dict.fromkeys(r.cell["model"] for r in throughput):
        here = [r for r in throughput if r.cell["model"] == model]
        if svg := throughput_plot(here, f"Throughput of {model}"):
            yield Plot(svg, f"{model} at saturation; the line is the 95% interval of the median.")
    for suite in (throughput, server):
        for model in dict.fromkeys(r.cell["model"] for r in suite):
            here = [r for r in suite if r.cell["model"] == model]
            if svg := load_plot(here, f"Latency against load of {model}"):
                yield Plot(svg, f"{model} through Triton, requests that arrive independently.")


def _full_size_table(run: Run) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = []
    for (tower, shape), forms in cells_by_shape(run.records).items():
        for name, record in forms.items():
            interval = bootstrap_median_interval(record.by_process)
            rows.append(
                (
                    tower,
                    shape,
                    name,
                    f"{record.median:,.1f}",
                    f"{interval.low:,.1f}–{interval.high:,.1f}",
                    record.unit,
                )
            )
    head = ("tower", "rows×tokens", "form", "median", "95%", "unit")
    return "Full size, random weights, one thread", head, tuple(rows)


def _peer_table(peers: Sequence[Record]) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = []
    for record in peers:
        cell = record.cell
        key = tuple(cell[name] for name in ("model", "tower", "batch", "tokens", "precision", "by", "engine"))
        if record.error is not None:
            rows.append((*key, "not measured", record.error))
            continue
        interval = bootstrap_median_interval(record.by_process)
        rows.append(
            (*key, f"{record.median:,.3g} {record.unit}", f"{interval.low:,.3g}–{interval.high:,.3g}")
        )
    head = ("model", "tower", "rows", "tokens", "precision", "by", "engine", "median", "95%, or why not")
    return "Peers, side by side in one run", head, tuple(rows)


def _other_table(run: Run) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return peaks, corpora, servers and footprints, with cells in words."""
    rows = []
    for record in run.records:
        cell = record.cell
        if cell.get("suite") in ("latency", "throughput", "peers") or "shape" in cell:
            continue
        name = " ".join(f"{k} {v}" if v[0].isdigit() else v for k, v in cell.items() if v and k != "by")
        value = record.error or f"{record.median:,.4g} {record.unit}"
        rows.append((name, value, str(len(record.samples))))
    return "Everything else", ("cell", "median", "samples"), tuple(rows)
