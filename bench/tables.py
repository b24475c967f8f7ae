"""Print a report as a table, and progress while it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.metrics import KS
from bench.report import Comparison, Direction, LanguageFigures, RetrievalReport
from bench.vectors import Progress as Callback

__all__ = ["Order", "print_report", "progress_bars"]

_TITLES = {Direction.TEXT_TO_IMAGE: "text→image", Direction.IMAGE_TO_TEXT: "image→text"}


class Order(str, Enum):
    """Order of languages in a table."""

    WORST = "worst"
    CODE = "code"


@contextmanager
def progress_bars(console: Console) -> Iterator[Callback]:
    """Yield a callback that shows a bar for each stage it is called with."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def print_report(console: Console, report: RetrievalReport, order: Order = Order.WORST) -> None:
    """Print facts, the table of languages, and the verdict."""
    model = report.model
    console.print(
        f"[bold]{model.name}[/] · {model.family} · {model.precision.value} on {model.engine.value} · "
        f"{report.dataset}, {report.n_images:,} images, {report.n_texts:,} texts"
    )
    console.print(
        f"recall: protocol {report.protocol.value!r}; language map {report.language_map.value!r}; PyTorch "
        f"padded {report.reference_padding}. Each cell: PyTorch, then the exported model's difference."
    )
    for note in report.notes:
        console.print(note, style="dim")
    if report.unspoken:
        console.print(
            f"Left out, no language token: {', '.join(report.unspoken)}", style="yellow", highlight=False
        )
    console.print(_table(report, order))
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


def _table(report: RetrievalReport, order: Order) -> Table:
    table = Table(header_style="bold", row_styles=["", "dim"], pad_edge=False)
    table.add_column("language", no_wrap=True)
    for direction in Direction:
        for k in KS:
            table.add_column(f"{_TITLES[direction]}\nR@{k}", justify="right", no_wrap=True)
    for title in ("cosine\nmin", "cosine\np1", "cosine\nmean", "top-10\noverlap"):
        table.add_column(title, justify="right", no_wrap=True)
    in_order = report.worst_first() if order is Order.WORST else report.languages
    for figures in in_order:
        table.add_row(*_cells(figures))
    table.add_section()
    table.add_row(*_summary_cells(report), style="bold not dim")
    return table


def _cells(figures: LanguageFigures) -> list[str]:
    cells = [f"{figures.code} {figures.name}"[:28]]
    for direction in Direction:
        comparison = figures.comparison(direction)
        cells += [_recall_cell(comparison, k) for k in KS]
    texts = figures.texts
    overlap = min(figures.comparison(direction).top10_overlap for direction in Direction)
    return [
        *cells,
        f"{texts.cosine_min:.7f}",
        f"{texts.cosine_p1:.7f}",
        f"{texts.cosine_mean:.7f}",
        f"{overlap:.4f}",
    ]


def _recall_cell(comparison: Comparison, k: int) -> str:
    delta = -comparison.drop(k)
    return f"{100 * comparison.reference.at[k]:.1f} {_signed(100 * delta)}"


def _signed(points: float) -> str:
    return "=" if abs(points) < 1e-9 else f"{points:+.2f}"


def _summary_cells(report: RetrievalReport) -> list[str]:
    cells = [f"mean of {len(report.languages)}"]
    for direction in Direction:
        for k in KS:
            reference, exported = report.mean_recall_at(direction, k)
            cells.append(f"{100 * reference:.1f} {_signed(100 * (exported - reference))}")
    texts = [figures.texts for figures in report.languages]
    overlaps = [f.comparison(direction).top10_overlap for f in report.languages for direction in Direction]
    return [
        *cells,
        f"{min(t.cosine_min for t in texts):.7f}",
        f"{min(t.cosine_p1 for t in texts):.7f}",
        f"{sum(t.cosine_mean for t in texts) / len(texts):.7f}",
        f"{sum(overlaps) / len(overlaps):.4f}",
    ]
