"""Compare zero-shot classification of exported models with PyTorch's, language by language.

    python bench/zeroshot.py                     every sample checkpoint on the emoji samples
    python bench/zeroshot.py nllb-clip altclip   some of them
    python bench/zeroshot.py --checkpoint FOLDER --model REPOSITORY/NAME --dataset babel-imagenet --data DATA

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

from bench.accuracy.classification import classify, classify_sample
from bench.accuracy.evaluation import EvaluationSettings
from bench.datasets import CLASS_LAYOUTS, read_classes
from bench.datasets.class_sets import Prompts
from bench.datasets.language_maps import LanguageMap
from bench.models.samples import SAMPLE_REPOSITORY, jobs_of, numbered
from bench.reporting.classification_table import print_classification
from bench.reporting.retrieval_table import Order
from export.commands.progress import progress_bars
from runtime.commands.options import device_option
from runtime.commands.reporting import ErrorReportingCommand
from runtime.device import device_from_name
from runtime.manifest import Engine, Precision

__all__ = ["app"]

SAMPLES_RECORD = Path("build/bench/zeroshot.json")
"""Default path of the samples' records; the model's name is inserted before the suffix."""

app = typer.Typer(add_completion=False)


@app.command(cls=ErrorReportingCommand)
def zeroshot(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Sample checkpoints; all by default.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Trained checkpoint, with --model.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="REPOSITORY/NAME", help="Model exported from it.")
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(CLASS_LAYOUTS)}.")] = "emoji",
    data: Annotated[Path | None, typer.Option(help="The data set's folder.")] = None,
    languages: Annotated[str | None, typer.Option(help="Codes, comma separated; all by default.")] = None,
    prompts: Annotated[
        Prompts | None, typer.Option(help="Bare labels or templates; by default the data set's usual.")
    ] = None,
    engine: Annotated[Engine, typer.Option(envvar="BABELTOWER_ENGINE")] = Engine.ONNXRUNTIME,
    precision: Annotated[Precision, typer.Option(envvar="BABELTOWER_PRECISION")] = Precision.FP32,
    threads: Annotated[
        int, typer.Option(min=1, envvar="BABELTOWER_THREADS", help="Use every core for full-size towers.")
    ] = 1,
    device: Annotated[str | None, device_option("")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of an MRL head; full width by default.")] = None,
    language_map: Annotated[
        LanguageMap, typer.Option(help="Babel-ImageNet's published map, or the correct one.")
    ] = LanguageMap.RIGHT,
    order: Annotated[Order, typer.Option(help="Order of the table's rows.")] = Order.WORST,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record.")] = None,
) -> None:
    """Classify with PyTorch and with the exported model, and compare."""
    chosen = read_classes(dataset, data, language_map)
    if languages:
        chosen = chosen.select([code.strip() for code in languages.split(",")])
    chosen = chosen.asked_by(prompts or chosen.prompts)
    settings = EvaluationSettings(
        engine,
        precision,
        threads,
        language_map=language_map,
        dim=dim,
        device=None if device is None else device_from_name(device),
    )
    console = Console()
    jobs = jobs_of(models or [], checkpoint, model)
    n_failed = 0
    for job_checkpoint, job_model in jobs:
        console.rule(escape(Path(job_checkpoint).name))
        with progress_bars(console) as progress:
            if job_model is None:
                report = classify_sample(job_checkpoint, SAMPLE_REPOSITORY, chosen, settings, progress)
            else:
                report = classify(job_checkpoint, job_model, chosen, settings, progress)
        print_classification(console, report, order)
        chosen_file = json_file or (SAMPLES_RECORD if job_model is None else None)
        record = numbered(chosen_file, report.model.name, n_jobs=len(jobs))
        if record is not None:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(report.to_json(), encoding="utf-8")
            console.print(f"record  {record}", markup=False, soft_wrap=True)
        n_failed += not report.passed
    raise typer.Exit(1 if n_failed else 0)


if __name__ == "__main__":
    app()
