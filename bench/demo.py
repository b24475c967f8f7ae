"""Run the whole workflow: export a sample checkpoint, check it, search it in many languages.

    python -m bench.demo [--checkpoint samples/checkpoints/nllb-clip] [--out demo]

Writes ``OUT/repository`` (a Triton model repository), ``OUT/retrieval.json`` (the record) and
``OUT/index.html`` (the page to look at).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape

from bench.accuracy.evaluation import EvaluationSettings, evaluate_towers
from bench.accuracy.retrieval_report import RetrievalReport
from bench.accuracy.searches import N_ANSWERS, Search, named_searches
from bench.datasets import read
from bench.reporting.retrieval_page import write_page
from bench.reporting.retrieval_table import Order, print_report
from export.checkpoint import towers_from_checkpoint
from export.commands.progress import progress_bars
from export.repository import Export, ExportOptions, repository_from_towers
from export.variants import FP32
from runtime.commands.reporting import ErrorReportingCommand
from runtime.preprocessing.languages import english_name

__all__ = ["SAMPLE", "SEARCHES", "app"]

SEARCHES: Sequence[tuple[str, str]] = (
    ("por_Latn", "🍍"),
    ("zho_Hans", "🐼"),
    ("arb_Arab", "🐪"),
    ("hin_Deva", "🐘"),
    ("jpn_Jpan", "🍣"),
    ("swh_Latn", "🦁"),
    ("ukr_Cyrl", "🌻"),
    ("heb_Hebr", "🍋"),
    ("kor_Hang", "🚲"),
    ("tam_Taml", "🥥"),
    ("amh_Ethi", "☕"),
    ("yor_Latn", "🐔"),
)
"""Language codes, each with the emoji whose name in that language is the query."""

SAMPLE = Path("samples/checkpoints/nllb-clip")
WHAT_THE_TOWERS_ARE = (
    "a small NLLB-CLIP, trained on the names of 1,911 emoji in 106 languages and several vendors' drawings; "
    "it searches the drawings of a vendor that it never saw"
)
"""What a newcomer must know of a sample to judge its answers."""

EXPORT = ExportOptions(replace=True, captions_per_language=0)
"""Options of the export; retrieval is measured afterwards, on all captions."""

app = typer.Typer(add_completion=False)


@app.command(cls=ErrorReportingCommand)
def demo(
    checkpoint: Annotated[Path, typer.Option(help="A sample checkpoint, or your own.")] = SAMPLE,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("demo"),
    threads: Annotated[int, typer.Option(min=1, help="Use every core for full-size towers.")] = 1,
) -> None:
    """Export a checkpoint, check it against PyTorch, search in many languages, and write a page."""
    console = Console()
    started = time.perf_counter()
    name = checkpoint.resolve().name
    settings = EvaluationSettings(threads=threads)
    if checkpoint.resolve() == SAMPLE.resolve():
        console.print(f"The towers: {WHAT_THE_TOWERS_ARE}.", markup=False)
    console.rule(f"1  Export {escape(name)}")
    with console.status("reading the checkpoint, writing and checking both graphs"):
        towers = towers_from_checkpoint(checkpoint)
        export = repository_from_towers(towers, out / "repository", name=name, options=EXPORT)
    _print_export(console, export)
    console.rule("2  Embed the held-out drawings and their names, twice")
    with progress_bars(console) as progress:
        done = evaluate_towers(towers, checkpoint, export.model, read("emoji"), settings, progress)
    console.rule("3  Retrieve, language by language")
    print_report(console, done.report, Order.WORST)
    console.rule("4  Search")
    searches = named_searches(done, SEARCHES)
    _print_searches(console, searches)
    (out / "retrieval.json").write_text(done.report.to_json(), encoding="utf-8")
    page = out / "index.html"
    write_page(page, done, searches)
    _print_end(console, page, done.report, time.perf_counter() - started)
    raise typer.Exit(0 if done.report.passed else 1)


def _print_export(console: Console, export: Export) -> None:
    manifest, parity = export.manifest, export.parity[FP32.key]
    console.print(
        f"{export.model}: {manifest.family}, {manifest.architecture}, {manifest.dim} wide", markup=False
    )
    console.print(f"reference: {parity.reference}; {parity.n_texts} texts and {parity.n_images} images")
    for engine, figures in parity.engines.items():
        console.print(
            f"parity on {engine}: lowest cosine of texts {figures.text.min_cosine:.8f}, of images "
            f"{figures.image.min_cosine:.8f} (limit {parity.limits.min_cosine})"
        )


def _print_searches(console: Console, searches: Sequence[Search]) -> None:
    for search in searches:
        found = "   ".join(
            f"{answer.key} {answer.score:.2f}{'✓' if answer.is_right else ''}" for answer in search.exported
        )
        mark = "" if search.agrees else "  [red](PyTorch's answers differ)[/]"
        console.print(f"[dim]{english_name(search.language):<26}[/] {escape(search.text)}{mark}")
        console.print(f"{'':<26} {found}")
    n_found = sum(search.is_found for search in searches)
    console.print(f"{n_found} of {len(searches)} queries have the right picture among the first {N_ANSWERS}")


def _print_end(console: Console, page: Path, report: RetrievalReport, seconds: float) -> None:
    stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in report.seconds.items())
    console.rule()
    console.print(f"{seconds:.0f} s ({stages})", style="dim")
    console.print(f"Look at it: {page}", style="bold", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
