"""Measure models in immich's folder: memory, opening, first answer, queries, and recall that precisions lose.

    python -m bench.immich [VARIANT …] --work FOLDER --json bench/results/immich.json

Published variants with random weights are laid out in FP32, FP16 and INT8, with a tokenizer of the published
number of tokens. Everything is fed as immich's service feeds it. A query of five tokens is timed in turns
with a plain FP32 export of the same tower in the same process: by the clock on the service's two threads, by
CPU time on one, where no thread waits for another in a loop. Recall is that of a sample checkpoint, which
is trained. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.models.full_size import in_process
from bench.models.immich_models import full_size_folder, plain_text_graph, recall_of_sample
from bench.records.record import Record, record_of, write_records
from bench.reporting.immich_table import immich_table, missed_targets
from bench.timing.immich_queries import N_TOKENS, opening_of, turns_of
from runtime.manifest import Precision

__all__ = ["cells_of_model", "cells_of_recall"]

PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
VARIANTS = ("nllb-clip-base-siglip",)

_OPENINGS = 3


def cells_of_model(variant: str, work: Path, *, turns: int) -> Iterator[Record]:
    """Lay out and measure a published variant in every precision."""
    plain = plain_text_graph(variant, work)
    for precision in PRECISIONS:
        folder = full_size_folder(variant, precision, work)
        opened = [opening_of(folder) for _ in range(_OPENINGS)]
        timed = turns_of(folder, plain, turns=turns)
        alone = turns_of(folder, plain, turns=turns, threads=1)
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        columns: dict[str, tuple[str, Sequence[float]]] = {
            "disk": ("MB", [n_bytes / 1e6]),
            "resident": ("MB", [found.resident_bytes / 1e6 for found in opened]),
            "resident text": ("MB", [found.text_resident_bytes / 1e6 for found in opened]),
            "load cpu": ("s", [found.load_cpu_s for found in opened]),
            "first wall": ("s", [found.first_wall_s for found in opened]),
            "first cpu": ("s", [found.first_cpu_s for found in opened]),
            "query wall": ("ms", timed.wall_ms),
            "query cpu": ("ms", alone.cpu_ms),
            "plain wall": ("ms", timed.plain_wall_ms),
            "plain cpu": ("ms", alone.plain_cpu_ms),
            "query cpu, two threads": ("ms", timed.cpu_ms),
            "plain cpu, two threads": ("ms", timed.plain_cpu_ms),
        }
        for metric, (unit, samples) in columns.items():
            cell = {"immich": metric, "model": variant, "precision": precision.value}
            threads = 1 if metric in ("query cpu", "plain cpu") else 2
            settings = {"weights": "random", "threads": threads, "n_tokens": N_TOKENS}
            yield record_of(cell, list(samples), unit=unit, settings=settings)


def cells_of_recall(sample: str, *, captions: int) -> Iterator[Record]:
    """Lay out a trained sample in every precision, and record the points of R@1 that its gate measured."""
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            lost, _ = in_process(recall_of_sample, sample, precision, Path(folder), captions)
        cell = {"immich": "recall lost", "model": sample, "precision": precision.value}
        yield record_of(cell, lost, unit="points", settings={"captions_per_language": captions})


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="Published names.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for models, up to 12 GB; kept.")] = Path("full-size"),
    turns: Annotated[int, typer.Option(min=3)] = 15,
    sample: Annotated[str, typer.Option(help="Trained sample whose recall is measured.")] = "nllb-siglip-mrl",
    captions: Annotated[int, typer.Option(min=1, help="Captions per language for recall.")] = 50,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Measure models in immich's folder."""
    console = Console(width=140)
    records = list(cells_of_recall(sample, captions=captions))
    for variant in variants or VARIANTS:
        records += cells_of_model(variant, work, turns=turns)
        if record is not None:
            write_records(records, record)
    console.print(Markdown(immich_table(records)))
    missed = missed_targets(records)
    for target in missed:
        console.print(f"missed: {target}")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
