"""Measure the recall that each precision loses, on every caption of the samples.

    python -m bench.precisions [SAMPLE …] [--work FOLDER] [--json FILE]

Each sample is exported in every precision for every installed engine, and the exporter's own gate compares
both directions in all languages with PyTorch. The record keeps the figures of each language, and the samples
that were measured earlier in the same environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

from bench.models.samples import sample_checkpoints
from bench.records.environment import environment
from export.commands.progress import progress_bars
from export.parity.limits import limits_of
from export.repository import ExportOptions, installed_engines, repository_from_checkpoint
from export.retrieval.comparison import Direction
from export.variants import forms_for, possible_forms
from runtime.commands.reporting import ErrorReportingCommand
from runtime.cosines import lowest
from runtime.manifest import Engine, Manifest, Precision
from runtime.storage import replace_text

__all__ = ["SCHEMA", "app", "rows_from_manifest"]

SCHEMA = "babeltower-precisions/1"
_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)

app = typer.Typer(add_completion=False)


def rows_from_manifest(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield one row per variant and engine: R@1 in percent, drops in points, worst languages."""
    for key, variant in manifest.variants.items():
        shares = [float(recipe.get("int8_share", 0.0)) for recipe in variant.recipe.values()]
        for engine, found in variant.parity["retrieval"].items():
            yield {
                "model": manifest.name,
                "variant": key,
                "engine": engine,
                "int8_share": min(shares, default=0.0),
                "min_cosine": lowest(e["cosine_min"] for e in found["languages"].values()),
                "row_alone": variant.parity["engines"][engine]["row_alone"],
                **{direction.value: _side(found, direction) for direction in Direction},
            }


def _side(found: Mapping[str, Any], direction: Direction) -> dict[str, Any]:
    mean = found["mean_recall_at_1"][direction.value]
    drops = {code: _drop(entry[direction.value]) for code, entry in found["languages"].items()}
    worst = max(drops, key=drops.__getitem__)
    return {
        "reference_percent": 100 * mean["reference"],
        "exported_percent": 100 * mean["exported"],
        "mean_drop_points": 100 * (mean["reference"] - mean["exported"]),
        "worst_language": worst,
        "worst_drop_points": drops[worst],
    }


def _drop(side: Mapping[str, Any]) -> float:
    return 100 * float(side["reference"]["1"] - side["exported"]["1"])


@app.command(cls=ErrorReportingCommand)
def precisions(
    samples: Annotated[
        list[str] | None, typer.Argument(metavar="[SAMPLE]...", help="All by default.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Repository to export to.")] = Path("build/precisions"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one run.")] = 1,
) -> None:
    """Export the samples in every precision and print the recall that each loses."""
    console = Console(width=140)
    rows: list[dict[str, Any]] = []
    languages: dict[str, Any] = {}
    forms, refused = possible_forms(forms_for(_PRECISIONS, [], installed=installed_engines()))
    for key, reason in refused.items():
        console.print(f"{key} is left out: {reason}", markup=False)
    options = ExportOptions(
        forms=forms,
        replace=True,
        captions_per_language=None,
        threads=threads,
    )
    for checkpoint in sample_checkpoints(samples or ()):
        name = checkpoint.name
        console.rule(name)
        with progress_bars(console) as progress:
            done = repository_from_checkpoint(checkpoint, work, name=name, options=options, progress=progress)
        rows += rows_from_manifest(done.manifest)
        languages[name] = {
            key: variant.parity["retrieval"] for key, variant in done.manifest.variants.items()
        }
    console.print(_table(rows))
    if json_file is not None:
        _write(json_file, rows, languages)
        console.print(f"record  {json_file}", markup=False, soft_wrap=True)


def _write(path: Path, rows: list[dict[str, Any]], languages: Mapping[str, Any]) -> None:
    """Write the record atomically, with the earlier samples of the same environment."""
    here = asdict(environment())
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if earlier.get("environment") != here:
        earlier = {}
    kept = [row for row in earlier.get("rows", []) if row["model"] not in languages]
    record = {
        "schema": SCHEMA,
        "environment": here,
        "limits": {p.value: asdict(limits_of(p, Engine.ONNXRUNTIME)) for p in _PRECISIONS},
        "rows": [*kept, *rows],
        "retrieval": {**earlier.get("retrieval", {}), **languages},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(record, ensure_ascii=False) + "\n")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="R@1 in percent, PyTorch → variant, mean over the languages; drops in points")
    for column in ("model", "variant", "engine", "int8 share", "text→image", "image→text", "worst language"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        sides = [row[direction.value] for direction in Direction]
        worst = max(sides, key=lambda side: float(side["worst_drop_points"]))
        table.add_row(
            row["model"],
            row["variant"],
            row["engine"],
            f"{100 * row['int8_share']:.0f} %" if row["int8_share"] else "",
            *(f"{side['reference_percent']:.2f} → {side['exported_percent']:.2f}" for side in sides),
            f"{worst['worst_language']} {-worst['worst_drop_points']:+.2f}",
        )
    return table


if __name__ == "__main__":
    app()
