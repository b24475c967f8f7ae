"""Measure every kind of index: size, build time, recall@10 against exact search, queries per second.

    python -m bench.index                      a sample model's 200,617 captions and 1,911 pictures
    python -m bench.index --model REPOSITORY/NAME --json FILE

Every index is measured twice: with rows held out of it, and with vectors of the other modality, as in a
search for pictures by text. ``runtime.corpus`` embeds the captions and pictures; the sample model is exported
to ``build/repository`` unless it is there. ``bench/results/index.json`` has the record of a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.models.samples import ROOT, sample_checkpoint
from bench.records.environment import environment
from runtime.commands.reporting import ErrorReportingCommand
from runtime.corpus import Columns, EngineChoice, Options, embed_corpus
from runtime.indexes import IndexRecord, Kind, Refinement, Settings, VectorShards, index_from_vectors
from runtime.manifest import Engine, Modality, Precision, manifest_path
from runtime.storage import replace_text

__all__ = ["IndexCell", "app", "cells_from_vectors", "vectors_from_samples"]

_SAMPLE = "nllb-clip"

VARIANTS: Mapping[str, tuple[Kind, Settings]] = {
    "flat": (Kind.FLAT, Settings()),
    "hnsw": (Kind.HNSW, Settings()),
    "ivf-pq": (Kind.IVF_PQ, Settings()),
    "ivf-pq, codes alone": (Kind.IVF_PQ, Settings(refine=Refinement.NONE)),
}
"""Each kind with its default settings, and the smallest index."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class IndexCell:
    """One index, measured with one kind of queries.

    Attributes:
        rows: Modality of the vectors in the index.
        queries: ``held-out rows``, or the modality of the queries.
    """

    rows: str
    variant: str
    queries: str
    index: IndexRecord


def vectors_from_samples(model: str | Path, folder: Path, *, threads: int) -> dict[Modality, Path]:
    """Embed the samples' captions and held-out pictures in FP32 on ONNX Runtime."""
    emoji = ROOT / "samples" / "emoji"
    engine = EngineChoice(Engine.ONNXRUNTIME, Precision.FP32, instances=1, threads=threads)
    captions = Options(columns=Columns(text="caption", language="flores"), engine=engine)
    pictures = Options(columns=Columns(id="emoji", image="image"), engine=engine)
    embed_corpus(model, emoji / "captions.parquet", folder / "text", captions)
    embed_corpus(model, emoji / "gallery.parquet", folder / "image", pictures)
    return {Modality.TEXT: folder / "text", Modality.IMAGE: folder / "image"}


def cells_from_vectors(
    vectors: Mapping[Modality, Path], folder: Path, *, threads: int
) -> Iterator[IndexCell]:
    """Build and measure every variant, one after another; the indexes are not kept."""
    for rows, shards in vectors.items():
        other = next(path for modality, path in vectors.items() if modality is not rows)
        for queries in (None, other):
            for name, (kind, settings) in VARIANTS.items():
                record = index_from_vectors(
                    shards,
                    folder / "index",
                    kind=kind,
                    settings=settings,
                    queries=queries,
                    threads=threads,
                    replace=True,
                )
                asked = "held-out rows" if queries is None else f"{VectorShards.open(queries).modality}s"
                yield IndexCell(rows.value, name, asked, _without_folders(record, asked))


def _without_folders(record: IndexRecord, asked: str) -> IndexRecord:
    """Remove folders from a record, since they differ between machines."""
    recall = replace(record.recall, queries=asked)
    return replace(record, source=Path(record.source).name, recall=recall)


@app.command(cls=ErrorReportingCommand)
def index(
    model: Annotated[
        Path | None, typer.Option(metavar="REPOSITORY/NAME", help="Exported model; a sample by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of FAISS and of the towers.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record.")] = None,
) -> None:
    """Build every kind of index over the samples' vectors, and print cost and recall."""
    console = Console()
    model = model or _sample_model()
    with tempfile.TemporaryDirectory() as work:
        with console.status("embedding the samples"):
            vectors = vectors_from_samples(model, Path(work), threads=threads)
        cells = []
        with console.status("building and measuring") as status:
            for cell in cells_from_vectors(vectors, Path(work), threads=threads):
                cells.append(cell)
                status.update(f"{cell.rows}s: {cell.variant}, {cell.queries}")
    console.print(_table(cells, model.name, threads))
    if json_file is not None:
        _write(json_file, model.name, threads, cells)
        console.print(f"record: {json_file}", style="dim", markup=False)


def _sample_model() -> Path:
    from export import repository_from_checkpoint

    model = ROOT / "build" / "repository" / _SAMPLE
    if not manifest_path(model).is_file():
        repository_from_checkpoint(sample_checkpoint(_SAMPLE), model.parent, name=_SAMPLE)
    return model


def _table(cells: list[IndexCell], model: str, threads: int) -> Table:
    """Return the table; searches use the effort that the index chose for a recall of 0.99."""
    plural = "" if threads == 1 else "s"
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{model}: indexes against exact search, {threads} thread{plural}"
    )
    for heading in ("rows", "index", "queries"):
        table.add_column(heading, overflow="fold")
    for heading in ("MB", "bytes/row", "build s", "effort", "recall@10", "ms/query", "queries/s"):
        table.add_column(heading, justify="right")
    for cell in cells:
        record, point = cell.index, cell.index.point
        assert point is not None  # thousands of rows are always measured
        seconds = sum(record.seconds.get(step, 0) for step in ("train", "add", "write"))
        table.add_row(
            f"{record.n_rows:,} {cell.rows}s",
            cell.variant,
            cell.queries,
            f"{record.size_bytes / 1e6:,.1f}",
            f"{record.size_bytes / record.n_rows:,.0f}",
            f"{seconds:,.1f}",
            str(point.effort or "–"),
            f"{point.recall:.4f}",
            f"{point.search_ms:.3f}",
            f"{point.queries_per_second:,.0f}",
        )
    return table


def _write(path: Path, model: str, threads: int, cells: list[IndexCell]) -> None:
    record = {
        "model": model,
        "threads": threads,
        "environment": asdict(environment()),
        "cells": [asdict(cell) for cell in cells],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
