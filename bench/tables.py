"""Print a report as a table, and progress while it is made."""

from __future__ import annotations

from enum import Enum

from rich import box
from rich.console import Console
from rich.table import Table

from bench.published_figures import published_figures
from bench.report import RetrievalReport
from export.retrieval.comparison import Direction, LanguageFigures
from export.retrieval.metrics import KS

__all__ = ["Order", "print_report", "print_verdict"]

_TITLES = {Direction.TEXT_TO_IMAGE: "t→i", Direction.IMAGE_TO_TEXT: "i→t"}
_WIDE_COLUMNS = 110
"""From this width of the terminal on, the table shows more of the cosines."""


class Order(str, Enum):
    """Order of languages in a table."""

    WORST = "worst"
    CODE = "code"


def print_report(console: Console, report: RetrievalReport, order: Order = Order.WORST) -> None:
    """Print facts, the table of languages, and the verdict."""
    model = report.model
    console.print(
        f"[bold]{model.name}[/] · {model.family} · {model.dim} wide · {model.precision.value} on "
        f"{model.engine.value} · "
        f"{report.dataset}, {report.n_images:,} images, {report.n_texts:,} texts"
    )
    console.print(
        f"recall: protocol {report.protocol.value!r}; language map {report.language_map.value!r}; PyTorch "
        f"padded {report.reference_padding}. Recalls are PyTorch's, in percent; where the exported model's "
        "differs, the difference stands behind."
    )
    for note in report.notes:
        console.print(note, style="dim")
    if report.unspoken:
        console.print(
            f"Left out, no language token: {', '.join(report.unspoken)}", style="yellow", highlight=False
        )
    console.print(_table(report, order, wide=console.width >= _WIDE_COLUMNS))
    means = [100 * report.mean_recall(direction)[1] for direction in Direction]
    console.print(f"mean recall over k=1, 5, 10: text→image {means[0]:.1f}, image→text {means[1]:.1f}")
    for published in published_figures(report.dataset, report.model.family):
        console.print(f"published  {published}", style="dim")
    print_verdict(console, report)


def print_verdict(console: Console, report: RetrievalReport) -> None:
    """Print whether the limits hold, and what broke them."""
    console.print(
        f"lowest cosine {report.min_cosine:.8f} (limit {report.limits.min_cosine}); {report.n_turned} of "
        f"{report.n_decisions:,} hits turned; a turn that PyTorch decides by less than "
        f"{report.limits.tie_margin:.0e} is a tie"
    )
    if report.passed:
        console.print("[bold green]PASS[/] the exported model retrieves what PyTorch retrieves")
    else:
        console.print(f"[bold red]FAIL[/] {len(report.failures)} limits broken")
        for failure in report.failures[:20]:
            console.print(f"  {failure}", style="red", markup=False)


def _table(report: RetrievalReport, order: Order, *, wide: bool) -> Table:
    table = Table(
        header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 2 if wide else 1, 0, 0), pad_edge=False
    )
    table.add_column("language", no_wrap=True, max_width=32 if wide else 18)
    for direction in Direction:
        for k in KS:
            table.add_column(f"{_TITLES[direction]}\nR@{k}", justify="right", no_wrap=True)
    agreements = (
        ("cosine\nmin", "p1", "mean", "top-10\nshared") if wide else ("cosine\nmin", "top-10\nshared")
    )
    for title in agreements:
        table.add_column(title, justify="right", no_wrap=True)
    in_order = report.worst_first() if order is Order.WORST else report.languages
    for figures in in_order:
        table.add_row(*_cells(figures, wide=wide))
    table.add_section()
    table.add_row(*_mean_cells(report, wide=wide), style="bold")
    return table


def _cells(figures: LanguageFigures, *, wide: bool) -> list[str]:
    pairs = [
        (comparison.reference.at[k], comparison.exported.at[k])
        for comparison in (figures.text_to_image, figures.image_to_text)
        for k in KS
    ]
    overlap = min(figures.text_to_image.top10_overlap, figures.image_to_text.top10_overlap)
    texts = figures.texts
    cosines = (texts.cosine_min, texts.cosine_p1, texts.cosine_mean)
    return [f"{figures.code} {figures.name}", *map(_recall_cell, pairs), *_agreement(cosines, overlap, wide)]


def _mean_cells(report: RetrievalReport, *, wide: bool) -> list[str]:
    pairs = [report.mean_recall_at(direction, k) for direction in Direction for k in KS]
    texts = [figures.texts for figures in report.languages]
    overlaps = [f.comparison(direction).top10_overlap for f in report.languages for direction in Direction]
    cosines = (
        min(t.cosine_min for t in texts),
        min(t.cosine_p1 for t in texts),
        sum(t.cosine_mean for t in texts) / len(texts),
    )
    overlap = sum(overlaps) / len(overlaps)
    return [f"mean of {len(texts)}", *map(_recall_cell, pairs), *_agreement(cosines, overlap, wide)]


def _agreement(cosines: tuple[float, float, float], overlap: float, wide: bool) -> list[str]:
    shown = cosines if wide else cosines[:1]
    return [*(f"{cosine:.7f}" for cosine in shown), f"{overlap:.4f}"]


def _recall_cell(pair: tuple[float, float]) -> str:
    """PyTorch's recall in percent, and the exported model's difference in points where there is one."""
    reference, exported = (100 * share for share in pair)
    difference = exported - reference
    return f"{reference:.1f}" + (f"[yellow]{difference:+.2f}[/]" if abs(difference) >= 0.005 else "")
