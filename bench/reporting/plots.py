"""Plots of the report as SVG in the page's own colours: text and axes follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench.records.record import Record
from bench.records.statistics import bootstrap_median_interval
from bench.timing.roofline import Peaks

__all__ = ["drop_plot", "latency_plot", "load_plot", "roofline_plot", "throughput_plot", "trials_plot"]

_INK, _LINE = "#010203", "#040506"
"""Placeholder colours, replaced by the page's variables in the finished SVG."""
_COLOURS = ("#3b6fd4", "#c8632b", "#2f9463", "#a3479e", "#8a7a1f", "#2b93a8", "#c2405a", "#6d6d7a")
_MARKERS = "osD^vPX*"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "babeltower",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 10,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def latency_plot(records: Sequence[Record], title: str) -> str | None:
    """Plot median wall time against batch, a panel per tower; both axes log."""
    towers = [t for t in ("text", "image") if any(r.cell["tower"] == t for r in records)]
    if not towers:
        return None
    with _figure(1, len(towers), width=3.5, height=3.3) as (figure, axes):
        forms = sorted({_form(record) for record in records})
        for axis, tower in zip(axes, towers, strict=True):
            here = [r for r in records if r.cell["tower"] == tower and r.error is None]
            tokens = _usual_tokens(here)
            for i, form in enumerate(forms):
                line = sorted(
                    (int(r.cell["batch"]), r.median)
                    for r in here
                    if _form(r) == form and r.cell["tokens"] in ("", tokens)
                )
                if line:
                    x, y = zip(*line, strict=True)
                    axis.plot(x, y, marker=_MARKERS[i % 8], color=_COLOURS[i % 8], label=form, ms=4.5, lw=1.4)
            batches = sorted({int(r.cell["batch"]) for r in here})
            axis.set(xscale="log", yscale="log", xlabel="rows in a batch", ylabel="median, ms a batch")
            _plain_ticks(axis.yaxis)
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.xaxis.minorticks_off()
            axis.set_title(f"{tower}{f', {tokens} tokens a text' if tower == 'text' and tokens else ''}")
            axis.grid(visible=True, alpha=0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
        return _svg(figure, title)


def throughput_plot(records: Sequence[Record], title: str) -> str | None:
    """Plot rows per second with the 95% interval of the median, a bar per cell."""
    rates = [r for r in records if r.error is None and r.cell["metric"] == "rate"]
    if not rates:
        return None
    rates = sorted(rates, key=lambda r: (r.cell["tower"], r.median))
    with _figure(1, 1, width=6.6, height=0.9 + 0.3 * len(rates)) as (figure, axes):
        (axis,) = axes
        names = [f"{r.cell['tower']}, {_form(r)}, {r.cell.get('load', '')}".rstrip(", ") for r in rates]
        ends = [bootstrap_median_interval(r.by_process) for r in rates]
        medians = [r.median for r in rates]
        errors = np.array(
            [[max(0.0, m - e.low), max(0.0, e.high - m)] for m, e in zip(medians, ends, strict=True)]
        ).T
        colours = [_COLOURS[0] if r.cell["tower"] == "text" else _COLOURS[1] for r in rates]
        axis.barh(range(len(rates)), medians, xerr=errors, color=colours, ecolor=_INK, capsize=2, height=0.7)
        axis.set_yticks(range(len(rates)), names)
        for i, (median, end) in enumerate(zip(medians, ends, strict=True)):
            axis.annotate(
                f"{median:,.0f}", (max(median, end.high), i), (4, 0), textcoords="offset points", va="center"
            )
        axis.set(xlabel="rows a second")
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.grid(visible=True, axis="x", alpha=0.6)
        return _svg(figure, title)


def load_plot(records: Sequence[Record], title: str) -> str | None:
    """Plot percentiles of latency against the rate of independent arrivals."""
    curve = [
        r
        for r in records
        if r.error is None and r.cell["metric"] == "wall" and r.cell.get("load", "").startswith("open")
    ]
    towers = sorted({r.cell["tower"] for r in curve})
    if not towers:
        return None
    with _figure(1, len(towers), width=3.5, height=3.0) as (figure, axes):
        for axis, tower in zip(axes, towers, strict=True):
            here = sorted(
                (r for r in curve if r.cell["tower"] == tower), key=lambda r: r.settings["offered_per_s"]
            )
            rates = [r.settings["offered_per_s"] for r in here]
            for i, percentile in enumerate((50, 90, 99)):
                values = [float(np.percentile(r.samples, percentile)) for r in here]
                axis.plot(
                    rates, values, marker=_MARKERS[i], color=_COLOURS[i], label=f"p{percentile}", ms=4.5
                )
            axis.set(xlabel="arrivals a second", ylabel="latency, ms", yscale="log", title=tower)
            axis.set_xlim(left=0)
            _plain_ticks(axis.yaxis)
            axis.grid(visible=True, alpha=0.6)
            axis.legend()
        return _svg(figure, title)


def roofline_plot(records: Sequence[Record], peaks: Peaks, title: str) -> str | None:
    """Plot operations per second against operations per byte, under the measured roofs; both log."""
    points = [
        r
        for r in records
        if r.error is None
        and r.cell["metric"] == "wall"
        and r.settings.get("bytes_per_run")
        and r.settings["threads"] == peaks.threads
    ]
    if not points:
        return None
    with _figure(1, 1, width=6.6, height=4.8) as (figure, axes):
        (axis,) = axes
        intensities = [r.settings["operations_per_run"] / r.settings["bytes_per_run"] for r in points]
        x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
        fastest, slowest = max(peaks.reads.values()), min(peaks.reads.values())
        precisions = [p for p in peaks.products if any(r.cell["precision"] == p for r in points)]
        for i, precision in enumerate(precisions):
            roof = peaks.products[precision]
            axis.plot(x, np.minimum(roof, x * fastest), color=_COLOURS[i], lw=1.2)
            here = [
                (a, r) for a, r in zip(intensities, points, strict=True) if r.cell["precision"] == precision
            ]
            for tower, marker in (("text", "o"), ("image", "s")):
                dots = [
                    (a, r.settings["operations_per_run"] / r.median / 1e6)
                    for a, r in here
                    if r.cell["tower"] == tower
                ]
                if dots:
                    label = (
                        f"{precision} {tower}, roof {roof:,.0f} GOP/s"
                        if tower == "text"
                        else f"{precision} {tower}"
                    )
                    axis.scatter(
                        *zip(*dots, strict=True),
                        s=22,
                        marker=marker,
                        color=_COLOURS[i],
                        alpha=0.75,
                        label=label,
                    )
        axis.plot(x, x * slowest, color=_INK, lw=0.8, ls=":", label=f"memory, {slowest:.0f} GB/s")
        axis.plot(x, x * fastest, color=_INK, lw=0.8, ls="--", label=f"cache, {fastest:.0f} GB/s")
        axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GOP/s")
        axis.set_ylim(top=2 * max(peaks.products.values()))
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis)
        axis.grid(visible=True, alpha=0.5)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return _svg(figure, title)


def drop_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str | None:
    """Plot the points of recall at 1 that each variant loses: mean and worst language."""
    rows = [row for row in rows if row["variant"] != "fp32"]
    if not rows:
        return None
    with _figure(1, 1, width=6.6, height=1.0 + 0.27 * len(rows)) as (figure, axes):
        (axis,) = axes
        for kind, marker, colour in (("mean", "o", _COLOURS[0]), ("worst", "s", _COLOURS[1])):
            values = [
                max(row[side][f"{kind}_drop_points"] for side in ("text_to_image", "image_to_text"))
                for row in rows
            ]
            name = "mean over the languages" if kind == "mean" else "the language that loses most"
            axis.scatter(values, range(len(rows)), s=28, marker=marker, color=colour, label=name)
        axis.set_yticks(range(len(rows)), [f"{row['model']}, {row['variant']}" for row in rows])
        axis.invert_yaxis()
        axis.axvline(0, color=_LINE, lw=1)
        axis.set(xlabel="points of R@1 lost to PyTorch, the worse direction")
        axis.grid(visible=True, alpha=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, title)


def trials_plot(report: Mapping[str, Any], title: str) -> str | None:
    """Plot recall lost against speed, for each number of products kept in FP32."""
    trials = report["trials"]
    if not trials:
        return None
    with _figure(1, 1, width=6.0, height=3.6) as (figure, axes):
        (axis,) = axes
        x = [trial["pairs_per_core_second"] for trial in trials]
        y = [100 * trial["mean_recall_drop"] for trial in trials]
        axis.scatter(x, y, color=_COLOURS[0], s=28)
        by_drop = sorted(zip(y, x, trials, strict=True), key=lambda entry: entry[:2])
        for i, (b, a, trial) in enumerate(by_drop):  # neighbours are labelled on different sides
            place = {"xytext": (6, -3)} if i % 2 else {"xytext": (-6, -3), "ha": "right"}
            axis.annotate(f"{trial['n_kept']} kept", (a, b), textcoords="offset points", fontsize=9, **place)
        axis.axhline(100 * report["max_recall_drop"], color=_COLOURS[6], ls="--", lw=1)
        axis.set(xlabel="text and image pairs a core-second", ylabel="points of R@1 lost, mean")
        axis.margins(0.12)
        axis.grid(visible=True, alpha=0.6)
        return _svg(figure, title)


def _form(record: Record) -> str:
    cell = record.cell
    return f"{cell['precision']} {cell['engine']}".strip()


def _plain_ticks(axis: Any) -> None:
    """Label a log axis with 1, 2, 5, 10, 20, …"""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _usual_tokens(records: Sequence[Record]) -> str:
    """Return 16 if it was measured, else the shortest length."""
    lengths = {r.cell["tokens"] for r in records if r.cell["tokens"]}
    return "16" if "16" in lengths else min(lengths, key=int, default="")


@contextmanager
def _figure(n_rows: int, n_columns: int, *, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes in a row, each of this width in inches; close it at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with mpl.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            n_rows, n_columns, figsize=(width * n_columns, height), squeeze=False, layout="constrained"
        )
        try:
            yield figure, axes.ravel()
        finally:
            pyplot.close(figure)


def _svg(figure: Any, title: str) -> str:
    """Return the drawing alone, with ids of its own and a label for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    prefix = re.sub(r"\W+", "-", title.lower())
    drawing = re.sub(r'\bid="', f'id="{prefix}-', drawing)
    drawing = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", drawing)
    drawing = drawing.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
