"""Printing of a report as a table, and of progress while it is made."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy.published_figures import PublishedFigures, published_beside, published_figures
from bench.accuracy.retrieval_report import ModelFacts, RetrievalReport
from export.retrieval.comparison import Direction, LanguageFigures
from export.retrieval.metrics import KS
from export.retrieval.verdict import RetrievalLimits
from runtime.cosines import lowest

__all__ = [
    "WIDE_COLUMNS",
    "JudgedReport",
    "Order",
    "print_model",
    "print_report",
    "print_verdict",
    "published_cell",
    "share_cell",
]

_TITLES = {Direction.TEXT_TO_IMAGE: "t→i", Direction.IMAGE_TO_TEXT: "i→t"}
WIDE_COLUMNS = 110
"""Minimum width of a terminal for more columns of cosines."""

_BESIDE = "text→image R@1"
"""Published measure with a column of its own, if it is available and there is room."""


class Order(str, Enum):
    """Order of languages in a table."""

    WORST = "worst"
    CODE = "code"


def print_report(console: Console, report: RetrievalReport, order: Order = Order.WORST) -> None:
    """Print facts, the table of languages, and the verdict."""
    print_model(
        console, report.model, f"{report.dataset}, {report.n_images:,} images, {report.n_texts:,} texts"
    )
    console.print(
        f"recall: protocol {report.protocol.value!r}; language map {report.language_map.value!r}; PyTorch "
        f"padded {report.reference_padding}. Recalls are PyTorch's, in percent, each followed by the "
        "exported model's difference, if any."
    )
    for note in report.notes:
        console.print(note, style="dim")
    if report.unspoken:
        console.print(
            f"Left out, no language token: {', '.join(report.unspoken)}", style="yellow", highlight=False
        )
    published = published_figures(report.dataset, report.model, report.notes)
    beside = published_beside(published, _BESIDE) if console.width >= WIDE_COLUMNS else None
    console.print(_table(report, order, beside, wide=console.width >= WIDE_COLUMNS and not beside))
    means = [100 * report.mean_recall(direction)[1] for direction in Direction]
    console.print(f"mean recall over k=1, 5, 10: text→image {means[0]:.1f}, image→text {means[1]:.1f}")
    for entry in published:
        console.print(f"published  {entry}", style="dim", highlight=False)
    print_verdict(console, report)


def print_model(console: Console, model: ModelFacts, dataset: str) -> None:
    """Print the compared model and the data set."""
    console.print(
        f"[bold]{model.name}[/] · {model.family} · {model.dim} wide · {model.precision.value} on "
        f"{model.engine.value} · {dataset}"
    )


class JudgedReport(Protocol):
    """Report with a verdict."""

    @property
    def limits(self) -> RetrievalLimits:
        """Limits of the verdict."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Exceeded limits, one sentence each."""

    @property
    def min_cosine(self) -> float:
        """Lowest cosine of any vector to PyTorch's."""

    @property
    def n_turned(self) -> int:
        """Number of turned hits."""

    @property
    def n_decisions(self) -> int:
        """Number of compared hits."""


def print_verdict(
    console: Console, report: JudgedReport, agrees: str = "retrieves what PyTorch retrieves"
) -> None:
    """Print the verdict and the exceeded limits."""
    console.print(
        f"lowest cosine {report.min_cosine:.8f} (limit {report.limits.min_cosine}); {report.n_turned} of "
        f"{report.n_decisions:,} hits turned; a turn that PyTorch decides by less than "
        f"{report.limits.tie_margin:.0e} is a tie"
    )
    if not report.failures:
        console.print(f"[bold green]PASS[/] the exported model {agrees}")
    else:
        console.print(f"[bold red]FAIL[/] {len(report.failures)} limits exceeded")
        for failure in report.failures[:20]:
            console.print(f"  {failure}", style="red", markup=False)


def published_cell(beside: PublishedFigures, code: str, measure: str) -> str:
    """Return a language's published value in percent; empty if there is none."""
    value = beside.of(code, measure)
    return "" if value is None else f"{value:.1f}"


def _table(report: RetrievalReport, order: Order, beside: PublishedFigures | None, *, wide: bool) -> Table:
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
    if beside:
        table.add_column("published\nt→i R@1", justify="right", no_wrap=True)
    in_order = report.worst_first() if order is Order.WORST else report.languages
    for figures in in_order:
        shown = [published_cell(beside, figures.code, _BESIDE)] if beside else []
        table.add_row(*_cells(figures, wide=wide), *shown)
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
    return [
        f"{figures.code} {figures.name}",
        *(share_cell(*pair) for pair in pairs),
        *_agreement(cosines, overlap, wide),
    ]


def _mean_cells(report: RetrievalReport, *, wide: bool) -> list[str]:
    pairs = [report.mean_recall_at(direction, k) for direction in Direction for k in KS]
    texts = [figures.texts for figures in report.languages]
    overlaps = [f.comparison(direction).top10_overlap for f in report.languages for direction in Direction]
    cosines = (
        lowest(t.cosine_min for t in texts),
        lowest(t.cosine_p1 for t in texts),
        sum(t.cosine_mean for t in texts) / len(texts),
    )
    overlap = sum(overlaps) / len(overlaps)
    return [
        f"mean of {len(texts)}",
        *(share_cell(*pair) for pair in pairs),
        *_agreement(cosines, overlap, wide),
    ]


def _agreement(cosines: tuple[float, float, float], overlap: float, wide: bool) -> list[str]:
    shown = cosines if wide else cosines[:1]
    return [*(f"{cosine:.7f}" for cosine in shown), f"{overlap:.4f}"]


def share_cell(reference: float, exported: float) -> str:
    """Return PyTorch's share in percent, and the exported model's difference in points, if any."""
    difference = 100 * (exported - reference)
    return f"{100 * reference:.1f}" + (f"[yellow]{difference:+.2f}[/]" if abs(difference) >= 0.005 else "")
