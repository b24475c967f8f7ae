"""The ``babeltower`` command line, including the commands that need the training libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.frontends import frontends
from export.commands.tune import tune
from runtime.backends import Engine
from runtime.commands.models import app
from runtime.cosines import nan_first
from runtime.errors import ExportError
from runtime.manifest import Precision, Variant

if TYPE_CHECKING:
    from export.parity.gate import RetrievalFigures
    from export.parity.measure import Agreement, ParityReport
    from export.repository import Export
    from export.sensitivity.quantize import Quantised

__all__ = ["app", "main"]


app.command()(frontends)
app.command()(tune)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder, .ckpt file or hub name of a trained model.")
    ],
    repository: Annotated[
        Path, typer.Argument(metavar="REPOSITORY", help="Triton model repository; created if missing.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model; the checkpoint's name by default.")
    ] = None,
    precision: Annotated[
        list[Precision], typer.Option(help="Precision of the matrix products; may be repeated.")
    ] = [Precision.FP32],  # noqa: B006
    engine: Annotated[
        list[Engine] | None,
        typer.Option(help="Inference engine to export for; may be repeated. All installed ones by default."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base checkpoint of a LoRA adapter.")] = None,
    context_length: Annotated[
        int | None, typer.Option(min=4, help="Maximum text length in tokens; the family's (77) by default.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace existing variants.")] = False,
    texts_per_language: Annotated[
        int, typer.Option(min=1, max=8, help="Probe texts per language for the cosine comparison.")
    ] = 4,
    captions_per_language: Annotated[
        int, typer.Option(min=1, help="Captions per language for the retrieval comparison.")
    ] = 200,
    all_captions: Annotated[
        bool, typer.Option("--all-captions", help="Compare retrieval on all captions.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Parquet file or image folder to calibrate on; the sample set by default."),
    ] = None,
    accept_drop: Annotated[
        float | None,
        typer.Option(min=0.0, max=100.0, help="Recall drop in points to accept beyond the limits; recorded."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per run; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export both towers, check parity with PyTorch and publish REPOSITORY/NAME.

    Exit code 0 means that every variant passed the parity check and the model is published. A variant that
    fails is not published; its report is written to REPOSITORY/NAME.VARIANT.refused.json. A variant that
    this machine cannot build or measure is refused at once; the others are published.
    """
    try:
        from export.repository import ExportOptions, installed_engines, repository_from_checkpoint
        from export.variants import forms_for, possible_forms
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Exporting needs {error.name}, which is not installed. Run: pip install 'babeltower[export]'"
        ) from error
    from rich.console import Console

    from export.commands.progress import progress_bars

    wanted = forms_for(precision, engine or [], installed=installed_engines())
    forms, refused = possible_forms(wanted)
    for key, reason in refused.items():
        typer.echo(f"{key} cannot be built here: {reason}", err=True)
    made = {form.precision for form in forms}
    missing = [form.key for form in wanted if form.key in refused and (engine or form.precision not in made)]
    if not forms:
        raise ExportError(f"Nothing was exported: {' '.join(refused.values())}")
    options = ExportOptions(
        forms=forms,
        replace=replace,
        texts_per_language=texts_per_language,
        captions_per_language=None if all_captions else captions_per_language,
        calibration=calibration,
        accept_drop=None if accept_drop is None else accept_drop / 100,
        threads=threads,
    )
    with progress_bars(Console(stderr=True)) as progress:
        done = repository_from_checkpoint(
            checkpoint,
            repository,
            name=name,
            base=base,
            context_length=context_length,
            options=options,
            progress=progress,
        )
    typer.echo(json.dumps(_record(done), ensure_ascii=False) if as_json else _summary(done))
    if missing:
        raise ExportError(
            f"{', '.join(missing)} cannot be built on this machine, for the reason above, and was not "
            f"published. Published variants: {', '.join(done.parity)}."
        )


@app.command()
def quantize(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder, .ckpt file or hub name of a trained model.")
    ],
    repository: Annotated[
        Path, typer.Argument(metavar="REPOSITORY", help="Triton model repository; created if missing.")
    ],
    engine: Annotated[Engine, typer.Option(help="Inference engine: onnxruntime or openvino.")],
    max_recall_drop: Annotated[
        float,
        typer.Option(min=0.01, max=99.0, help="Maximum R@1 drop in points, mean over the languages."),
    ] = 0.5,
    min_int8_share: Annotated[
        float,
        typer.Option(min=0.0, max=100.0, help="Minimum percent of each tower's operations in INT8."),
    ] = 50.0,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; the checkpoint's name by default.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base checkpoint of a LoRA adapter.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Parquet file or image folder to calibrate on; the sample set by default."),
    ] = None,
    n_texts: Annotated[int, typer.Option(min=1, help="Number of calibration texts.")] = 640,
    n_images: Annotated[int, typer.Option(min=1, help="Number of calibration images.")] = 128,
    seed: Annotated[int, typer.Option(help="Random seed of the calibration sample.")] = 0,
    method: Annotated[str | None, typer.Option(help="Clipping: min-max, percentile, entropy or mse.")] = None,
    percentile: Annotated[
        float | None, typer.Option(help="Percentile of magnitudes, for --method percentile.")
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="SmoothQuant's alpha: share of outliers moved into the weights."),
    ] = None,
    captions_per_language: Annotated[
        int, typer.Option(min=1, help="Captions per language that recall is measured on.")
    ] = 200,
    all_captions: Annotated[
        bool, typer.Option("--all-captions", help="Measure recall on all captions.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Path of the .json, .md and .svg reports; beside the model by default."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing variant.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the parity gate; all cores by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Publish REPOSITORY/NAME in INT8, keeping the fewest matrix products in FP32 that meet a recall limit.

    The retrieval cost of INT8 is measured per product; the costliest products stay in FP32 until the limit
    holds. Writes the tables and a plot of recall drop against speed, then runs the parity gate.
    """
    try:
        from export.sensitivity.quantize import (
            QuantiseOptions,
            quantised_from_checkpoint,
            recipe_from_options,
        )
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Quantizing needs {error.name}, which is not installed. Run: pip install 'babeltower[export]'"
        ) from error
    from rich.console import Console

    from export.commands.progress import progress_bars
    from export.precision.calibration import CalibrationSize

    options = QuantiseOptions(
        engine=engine,
        max_recall_drop=max_recall_drop / 100,
        min_share_int8=min_int8_share / 100,
        recipe=recipe_from_options(engine, method=method, percentile=percentile, smooth=smooth),
        calibration=calibration,
        calibration_size=CalibrationSize(n_texts, n_images, seed),
        captions_per_language=None if all_captions else captions_per_language,
        replace=replace,
        report=report,
        threads=threads,
    )
    with progress_bars(Console(stderr=True)) as progress:
        done = quantised_from_checkpoint(
            checkpoint, repository, options, name=name, base=base, progress=progress
        )
    if as_json:
        record = {**_record(done.export), "sensitivity": done.report.as_json()}
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    typer.echo(_summary(done.export))
    typer.echo("\n".join(_sensitivity_lines(done)))


def main() -> None:
    """Run the ``babeltower`` command line."""
    app()


def _record(done: Export) -> dict[str, object]:
    return {
        "model": str(done.model),
        "fingerprint": done.manifest.fingerprint,
        "family": done.manifest.family,
        "dims": [done.manifest.dim, *done.manifest.mrl_dims],
        "dropped": dict(done.dropped),
        "parity": {key: report.as_json() for key, report in done.parity.items()},
        "seconds": {step: round(seconds, 2) for step, seconds in done.seconds.items()},
    }


def _summary(done: Export) -> str:
    manifest = done.manifest
    lines = [
        f"published    {done.model}",
        f"model        {manifest.family}, {manifest.architecture}",
        f"vectors      {manifest.dim} wide"
        + (f", MRL heads {list(manifest.mrl_dims)}" if manifest.mrl_dims else ""),
        f"fingerprint  {manifest.fingerprint}",
    ]
    for key, report in done.parity.items():
        lines += _variant_lines(manifest.variants[key], key, report)
    lines += [f"removed      {key} of an earlier export: {why}" for key, why in done.dropped.items()]
    lines.append(
        "seconds      " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in done.seconds.items())
    )
    return "\n".join(lines)


def _variant_lines(variant: Variant, key: str, report: ParityReport) -> Iterator[str]:
    size = sum(record.size_bytes for tower in (variant.text, variant.image) for record in tower.files)
    yield f"{key:<12} {size / 1e6:,.1f} MB on disk"
    yield f"  reference  {report.reference}"
    yield (
        f"  compared   {report.n_texts} texts, {report.n_images} images; token ids equal; "
        f"pixels within {report.max_pixel_error * 255:.2f}/255"
    )
    for engine, figures in report.engines.items():
        language, worst = min(figures.languages.items(), key=lambda item: nan_first(item[1].min_cosine))
        yield f"  {engine}"
        yield f"    text       {_agreement(figures.text)}"
        yield f"    image      {_agreement(figures.image)}"
        yield f"    languages  {len(figures.languages)}; worst {language} at cosine {worst.min_cosine:.8f}"
        yield f"    alone      a text alone and in a batch differ by ≤ {figures.row_alone:.1e}"
        if engine in report.retrieval:
            yield from _retrieval_lines(report.retrieval[engine])


def _retrieval_lines(found: RetrievalFigures) -> Iterator[str]:
    from export.retrieval.comparison import Direction

    for direction in Direction:
        reference, exported = found.mean_recall_at_1(direction)
        worst = found.worst_language(direction)
        title = "text→image" if direction is Direction.TEXT_TO_IMAGE else "image→text"
        yield (
            f"    {title} R@1 {100 * reference:.2f} → {100 * exported:.2f}, mean of {len(found.languages)} "
            f"languages; worst {worst.code}: {-100 * worst.comparison(direction).drop(1):+.2f} points"
        )


def _sensitivity_lines(done: Quantised) -> Iterator[str]:
    chosen, costs = done.report.chosen, done.report.costs
    if chosen is not None:
        yield (
            f"kept in FP32 {len(chosen.kept)} of {len(costs)} products; {100 * chosen.share_int8:.1f}% of "
            f"operations in INT8, R@1 drops by {100 * chosen.mean_drop:.2f} points in the mean, by "
            f"{100 * chosen.worst_drop:.2f} in {chosen.worst_language}"
        )
        yield from (f"             {p.modality.value} {p.name}" for p in chosen.kept)
    costliest = costs[0]
    yield (
        f"costliest    {costliest.product.modality.value} {costliest.product.name}: expected to change "
        f"{100 * costliest.turned:.2f}% of nearest neighbours on its own"
    )
    yield from (f"written      {path}" for path in done.files)


def _agreement(measured: Agreement) -> str:
    return f"cosine ≥ {measured.min_cosine:.8f}, error ≤ {measured.max_abs_error:.1e}"


if __name__ == "__main__":
    main()
