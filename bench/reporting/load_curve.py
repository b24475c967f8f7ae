"""Plot of latency against load: percentiles of requests at each arrival rate, as SVG or PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.records.record import Record

__all__ = ["draw_load_curve"]

_PERCENTILES = (50, 90, 99)


def draw_load_curve(records: Sequence[Record], path: Path) -> None:
    """Draw one panel per tower; the file's suffix sets the format.

    Args:
        records: Wall times of the suite ``server`` under Poisson arrivals; others are ignored.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[Record]] = {}
    for record in records:
        cell = record.cell
        if record.error is None and cell["metric"] == "wall" and cell.get("load", "").startswith("open"):
            title = f"{cell['model']}, {cell['tower']}, {cell['precision']} on {cell['engine']}"
            curves.setdefault(title, []).append(record)
    if not curves:
        return
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(6.2 * len(curves), 4), squeeze=False, layout="constrained"
    )
    for axis, (title, found) in zip(axes[0], curves.items(), strict=True):
        rates = [record.settings["offered_per_s"] for record in found]
        for percentile in _PERCENTILES:
            values = [float(np.percentile(record.samples, percentile)) for record in found]
            axis.plot(rates, values, marker="o", label=f"p{percentile}")
        axis.set(xlabel="arrivals a second", ylabel="latency, ms", yscale="log", title=title)
        axis.set_xlim(left=0)
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
