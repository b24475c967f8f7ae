"""``babeltower quantize``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.export import record_of_export, summary_of_export
from runtime.extras import needing
from runtime.manifest import Engine

if TYPE_CHECKING:
    from export.sensitivity.quantize import QuantizedModel

__all__ = ["quantize"]


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
    image_tower: Annotated[
        str | None,
        typer.Option(help="Open_clip folder or hub name of the image tower, for M-CLIP's text towers."),
    ] = None,
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
    with needing("Quantizing", "babeltower[export]"):
        from rich.console import Console

        from export.sensitivity.quantize import (
            QuantizeOptions,
            quantized_from_checkpoint,
            recipe_from_options,
        )

    from export.commands.progress import progress_bars
    from export.precision.calibration import CalibrationSize

    options = QuantizeOptions(
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
        done = quantized_from_checkpoint(
            checkpoint, repository, options, name=name, base=base, image_tower=image_tower, progress=progress
        )
    if as_json:
        record = {**record_of_export(done.export), "sensitivity": done.report.as_json()}
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    typer.echo(summary_of_export(done.export))
    typer.echo("\n".join(_sensitivity_lines(done)))


def _sensitivity_lines(done: QuantizedModel) -> Iterator[str]:
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
