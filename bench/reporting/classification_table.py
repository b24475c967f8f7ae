"""Print a classification report as a table."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy.classification_report import ClassFigures, ClassificationReport
from bench.accuracy.published_figures import PublishedFigures, published_beside, published_figures
from bench.datasets.class_sets import Prompts
from bench.reporting.retrieval_table import (
    WIDE_COLUMNS,
    Order,
    print_model,
    print_verdict,
    published_cell,
    share_cell,
)
from runtime.cosines import lowest

__all__ = ["print_classification"]

_KS = (1, 5)


def print_classification(console: Console, report: ClassificationReport, order: Order = Order.WORST) -> None:
    """Print facts, the table of languages, and the verdict."""
    print_model(console, report.model, f"{report.dataset}, {report.n_images:,} images")
    asked = "bare label" if report.prompts is Prompts.LABELS else "mean of the label in every template"
    console.print(
        f"top-k accuracy, class prompt: {asked}; language map {report.language_map.value!r}; PyTorch "
        f"padded {report.reference_padding}. Accuracies are PyTorch's, in percent, each followed by "
        "the exported model's difference, if any."
    )
    for note in report.notes:
        console.print(note, style="dim")
    if report.unspoken:
        console.print(
            f"Left out, no language token: {', '.join(report.unspoken)}", style="yellow", highlight=False
        )
    measure = f"top-1, {report.prompts.value}"
    published = [
        entry for entry in published_figures(report.dataset, report.model) if measure in entry.measures
    ]
    beside = published_beside(published, measure)
    console.print(_table(report, order, beside, wide=console.width >= WIDE_COLUMNS))
    for entry in published:
        console.print(f"published  {entry}", style="dim", highlight=False)
    print_verdict(console, report, "classifies as PyTorch classifies")


def _table(
    report: ClassificationReport, order: Order, beside: PublishedFigures | None, *, wide: bool
) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("language", no_wrap=True, max_width=32 if wide else 12)
    shares = ("chance\ntop-1", *(f"top-{k}" for k in _KS))
    for title in ("classes", "images", *shares, "cosine\nmin", "top-10\nshared"):
        table.add_column(title, justify="right", no_wrap=True)
    if beside:
        table.add_column("published\ntop-1", justify="right", no_wrap=True)
    for figures in report.worst_first() if order is Order.WORST else report.languages:
        cells = _cells(figures)
        if beside:
            cells.append(published_cell(beside, figures.code, f"top-1, {report.prompts.value}"))
        table.add_row(*cells)
    table.add_section()
    table.add_row(*_mean_cells(report), style="bold")
    return table


def _cells(figures: ClassFigures) -> list[str]:
    found = figures.classification
    return [
        f"{figures.code} {figures.name}",
        f"{figures.n_classes:,}",
        f"{figures.n_images:,}",
        f"{100 / figures.n_classes:.2f}",
        *(share_cell(found.reference.at[k], found.exported.at[k]) for k in _KS),
        f"{figures.texts.cosine_min:.7f}",
        f"{found.top10_overlap:.4f}",
    ]


def _mean_cells(report: ClassificationReport) -> list[str]:
    languages, n = report.languages, len(report.languages)
    return [
        f"mean of {n}",
        *("", "", f"{sum(100 / figures.n_classes for figures in languages) / n:.2f}"),
        *(share_cell(*report.mean_accuracy_at(k)) for k in _KS),
        f"{lowest(figures.texts.cosine_min for figures in languages):.7f}",
        f"{sum(figures.classification.top10_overlap for figures in languages) / n:.4f}",
    ]
