"""Compare retrieval of exported models with PyTorch's, language by language.

    python bench/retrieval.py                        every sample checkpoint on the emoji samples
    python bench/retrieval.py nllb-clip altclip      some of them
    python bench/retrieval.py --checkpoint FOLDER --model REPOSITORY/NAME --dataset xtd10 --data FOLDER

Sample checkpoints are exported to ``build/repository`` unless it holds them. The exit code is 1 if an
exported model exceeds a limit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape

from bench.accuracy.evaluation import EvaluationSettings, evaluate, evaluate_sample
from bench.accuracy.retrieval_report import Evaluation, RetrievalReport
from bench.accuracy.searches import sample_searches
from bench.datasets import (
    LAYOUTS,
    CaptionChoice,
    MissingImages,
    ReadOptions,
    RetrievalSet,
    Translator,
    read,
)
from bench.datasets.language_maps import LanguageMap
from bench.models.samples import SAMPLE_REPOSITORY, jobs_of, numbered
from bench.reporting.changed_hits import write_turned
from bench.reporting.retrieval_page import write_page
from bench.reporting.retrieval_table import Order, print_report
from export.commands.progress import progress_bars
from export.retrieval.metrics import RetrievalProtocol
from runtime.commands.options import device_option
from runtime.commands.reporting import ErrorReportingCommand
from runtime.device import device_from_name
from runtime.manifest import Engine, Precision

__all__ = ["app", "retrieval_report"]

SAMPLES_RECORD = Path("build/bench/retrieval.json")
"""Default path of the samples' records; the model's name is inserted before the suffix."""

app = typer.Typer(add_completion=False)


def retrieval_report(
    checkpoint: str | Path,
    model: str | Path,
    dataset: RetrievalSet,
    settings: EvaluationSettings | None = None,
) -> RetrievalReport:
    """Evaluate one exported model beside the checkpoint it came from, without printing.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        model: ``REPOSITORY/NAME``, exported from that checkpoint.
        dataset: From ``bench.datasets.read``.

    Raises:
        BabeltowerError: the checkpoint, the model or an image cannot be read, or they do not belong together.
    """
    return evaluate(checkpoint, model, dataset, settings or EvaluationSettings()).report


@app.command(cls=ErrorReportingCommand)
def retrieval(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Sample checkpoints; all by default.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Trained checkpoint, with --model.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="REPOSITORY/NAME", help="Model exported from it.")
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "emoji",
    data: Annotated[Path | None, typer.Option(help="The data set's folder.")] = None,
    languages: Annotated[str | None, typer.Option(help="Codes, comma separated; all by default.")] = None,
    captions: Annotated[CaptionChoice, typer.Option(help="Captions of Crossmodal-3600.")] = CaptionChoice.ALL,
    translator: Annotated[Translator, typer.Option(help="Translator, for CAPIVARA.")] = Translator.ALL,
    missing_images: Annotated[MissingImages, typer.Option()] = MissingImages.REFUSE,
    engine: Annotated[Engine, typer.Option(envvar="BABELTOWER_ENGINE")] = Engine.ONNXRUNTIME,
    precision: Annotated[Precision, typer.Option(envvar="BABELTOWER_PRECISION")] = Precision.FP32,
    threads: Annotated[
        int, typer.Option(min=1, envvar="BABELTOWER_THREADS", help="Use every core for full-size towers.")
    ] = 1,
    device: Annotated[str | None, device_option("")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of an MRL head; full width by default.")] = None,
    language_map: Annotated[
        LanguageMap, typer.Option(help="NLLB-CLIP's published map, or the correct one.")
    ] = LanguageMap.RIGHT,
    protocol: Annotated[
        RetrievalProtocol,
        typer.Option(help="For several right answers: any in the top k, or their share."),
    ] = RetrievalProtocol.ANY,
    order: Annotated[Order, typer.Option(help="Order of the table's rows.")] = Order.WORST,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page.")] = None,
) -> None:
    """Retrieve with PyTorch and with the exported model, and compare."""
    options = ReadOptions(language_map, captions, translator, missing_images)
    chosen = read(dataset, data, options)
    if languages:
        chosen = chosen.select([code.strip() for code in languages.split(",")])
    place = None if device is None else device_from_name(device)
    settings = EvaluationSettings(engine, precision, threads, protocol, language_map, dim, place)
    console = Console()
    jobs = jobs_of(models or [], checkpoint, model)
    n_failed = 0
    for job_checkpoint, job_model in jobs:
        console.rule(escape(Path(job_checkpoint).name))
        with progress_bars(console) as progress:
            if job_model is None:
                done = evaluate_sample(job_checkpoint, SAMPLE_REPOSITORY, chosen, settings, progress)
            else:
                done = evaluate(job_checkpoint, job_model, chosen, settings, progress)
        print_report(console, done.report, order)
        record = json_file or (SAMPLES_RECORD if job_model is None else None)
        name, n_jobs = done.report.model.name, len(jobs)
        _write(
            console,
            done,
            numbered(record, name, n_jobs=n_jobs),
            numbered(html_file, name, n_jobs=n_jobs),
        )
        n_failed += not done.report.passed
    raise typer.Exit(1 if n_failed else 0)


def _write(console: Console, done: Evaluation, json_file: Path | None, html_file: Path | None) -> None:
    for path in (json_file, html_file):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        json_file.write_text(done.report.to_json(), encoding="utf-8")
        console.print(f"record  {json_file}", markup=False, soft_wrap=True)
        if turned := write_turned(json_file, done):
            console.print(f"turned  {turned}", markup=False, soft_wrap=True)
    if html_file is not None:
        write_page(html_file, done, sample_searches(done))
        console.print(f"page    {html_file}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
