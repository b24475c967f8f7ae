"""Measure ``babeltower serve`` in place of immich's service: memory, first answers, queries.

    python -m bench.immich_service [VARIANT …] --work FOLDER --json bench/results/immich_service.json

Published text towers with random weights are served in INT8, each by processes of their own that open it
at the first request and give it back when it is idle, and asked over HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.models.immich_models import served_repository
from bench.records.record import Record, record_of, write_records
from bench.reporting.immich_table import service_table
from bench.timing.immich_service import figures_of_service
from runtime.manifest import Precision

__all__ = ["cells_of_service"]

VARIANTS = ("nllb-clip-base-siglip",)
PRECISIONS = (Precision.INT8,)


def cells_of_service(repository: Path, model: str, precision: Precision, *, starts: int) -> Iterator[Record]:
    """Serve a repository several times; yield one record a figure."""
    found = [figures_of_service(repository, model, queries=15) for _ in range(starts)]
    columns: dict[str, tuple[str, Sequence[float]]] = {
        "idle": ("MB", [one.idle_bytes / 1e6 for one in found]),
        "text": ("MB", [one.text_bytes / 1e6 for one in found]),
        "unloaded": ("MB", [one.unloaded_bytes / 1e6 for one in found]),
        "first wall": ("s", [one.first_wall_s for one in found]),
        "first cpu": ("s", [one.first_cpu_s for one in found]),
        "again wall": ("s", [one.again_wall_s for one in found]),
        "again cpu": ("s", [one.again_cpu_s for one in found]),
        "query wall": ("ms", [ms for one in found for ms in one.query_wall_ms]),
        "query cpu": ("ms", [ms for one in found for ms in one.query_cpu_ms]),
    }
    for figure, (unit, samples) in columns.items():
        cell = {"immich service": figure, "model": model, "precision": precision.value}
        yield record_of(cell, list(samples), unit=unit, settings={"weights": "random"})


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="Published names.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for models, up to 5 GB; kept.")] = Path("full-size"),
    starts: Annotated[int, typer.Option(min=1)] = 3,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Measure ``babeltower serve`` in place of immich's service."""
    records: list[Record] = []
    for variant in variants or VARIANTS:
        for precision in PRECISIONS:
            repository = served_repository(variant, precision, work)
            records += cells_of_service(repository, variant, precision, starts=starts)
            if record is not None:
                write_records(records, record)
    Console(width=140).print(Markdown(service_table(records)))


if __name__ == "__main__":
    typer.run(main)
