"""Measure the stages of corpus embedding on a sample model, and the whole pipeline.

Stages run on one thread and are timed in CPU time: reading the source, preparing inputs (tokenising texts,
decoding and resizing images), the tower, writing the parts. The pipeline is measured in rows per second and
per CPU second of the process, all stages included.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.models.sample_exports import sample_export
from bench.records.record import Record, record_of, suite_cell
from bench.records.statistics import bootstrap_median_interval
from export.retrieval.sample_set import sample_retrieval_set
from runtime.corpus import EngineChoice, Options, embed_corpus, open_source
from runtime.corpus.options import MAX_BATCH_TOKENS
from runtime.corpus.output import PartWriter
from runtime.corpus.pipeline import EmbeddedPart
from runtime.corpus.rows import IdType, ImageFile
from runtime.corpus.slices import Counts
from runtime.corpus.sources import NumberedRows
from runtime.corpus.stores.local import LocalStore
from runtime.embeddings import Encoding
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Modality, Precision
from runtime.preprocessing.batching import batches_from_rows
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.preprocessing.text import Text

__all__ = ["STAGES", "Corpus", "measure_stages", "print_stages"]

STAGES: Mapping[Modality, tuple[str, ...]] = {
    Modality.TEXT: ("read", "tokenise", "tower", "write"),
    Modality.IMAGE: ("read", "decode", "tower", "write"),
}
_BATCH_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Corpus:
    """Numbers of texts and images to embed, and of turns."""

    n_texts: int = 4_000
    n_images: int = 384
    turns: int = 6


def measure_stages(sample: str, corpus: Corpus, console: Console) -> list[Record]:
    """Measure rows per core-second of each stage and the pipeline, FP32 on ONNX Runtime.

    Raises:
        DatasetError: there is no such sample.
    """
    console.print(f"{sample}: exporting unless it exists …", style="dim")
    model = sample_export(sample, [Precision.FP32]).model
    records: list[Record] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalEncoder.from_repository(model, threads=1) as encoder,
    ):
        for modality in Modality:
            console.print(f"{sample}, {modality.value}s …", style="dim")
            cell = partial(
                suite_cell,
                suite="corpus",
                metric="rate",
                model=encoder.manifest.name,
                family=encoder.manifest.family,
                tower=modality.value,
                engine=Engine.ONNXRUNTIME.value,
                precision=Precision.FP32.value,
            )
            source = _source(encoder, modality, corpus, Path(scratch))
            runs = _runs(encoder, modality, source, Path(scratch))
            n_rows = corpus.n_texts if modality is Modality.TEXT else corpus.n_images
            settings = {"threads": 1, "turns": corpus.turns, "rows": n_rows}
            records += [
                record_of(cell(load=stage), values, unit="rows/core-second", settings=settings)
                for stage, values in _turns(runs, n_rows, corpus.turns).items()
            ]
            records += _whole(model, source, corpus.turns, cell)
    return records


def _turns(runs: Mapping[str, Callable[[], Any]], n_rows: int, turns: int) -> dict[str, list[float]]:
    """Return rows per CPU second of each stage, after one warm-up turn."""
    samples: dict[str, list[float]] = {stage: [] for stage in runs}
    for run in runs.values():
        run()
    for _ in range(turns):
        for stage, run in runs.items():
            started = time.process_time()
            run()
            samples[stage].append(n_rows / (time.process_time() - started))
    return samples


def _source(encoder: LocalEncoder, modality: Modality, corpus: Corpus, scratch: Path) -> Path:
    """Write the captions to a Parquet file, or the drawings to a folder."""
    import pyarrow
    import pyarrow.parquet

    dataset = sample_retrieval_set()
    if modality is Modality.IMAGE:
        folder = scratch / "drawings"
        folder.mkdir()
        for i in range(corpus.n_images):
            image = dataset.images[i % len(dataset.images)]
            (folder / f"{i:05d}.png").write_bytes(image.read())
        return folder
    entries = [entry for entry in dataset.captions if entry.language in encoder.manifest.languages]
    rows = [(text, entry.language) for entry in entries for text in entry.texts]
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = [rows[order[i % len(rows)]] for i in range(corpus.n_texts)]
    texts, languages = zip(*chosen, strict=True)
    columns = {"id": list(range(len(texts))), "text": texts}
    if encoder.manifest.text.needs_language:
        columns["language"] = languages
    path = scratch / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _runs(
    encoder: LocalEncoder, modality: Modality, source: Path, scratch: Path
) -> dict[str, Callable[[], Any]]:
    """Return each stage as a function over the whole source, given the previous stage's output."""
    manifest = encoder.manifest

    def read() -> list[tuple[Any, Any]]:
        rows = list(NumberedRows(open_source(source), lambda start, stop: True))
        items = [item for part in rows for item in part.items]
        languages = [code for part in rows for code in part.languages or [None] * len(part)]
        return [
            (item.read() if isinstance(item, ImageFile) else item, code)
            for item, code in zip(items, languages, strict=True)
        ]

    def tokenise() -> Any:
        return encoder.token_rows([Text(text, i, code) for i, (text, code) in enumerate(items)])

    def decoded() -> Any:
        return [pixels_from_image(decode(data), manifest.image) for data, _ in items]

    def text_tower() -> Any:
        ids = [row.ids for row in inputs]
        batches = batches_from_rows(ids, pad_id=manifest.text.pad_id, max_batch_tokens=MAX_BATCH_TOKENS)
        return np.concatenate([encoder.vectors_from_tokens(batch) for batch in batches])

    def image_tower() -> Any:
        starts = range(0, len(inputs), _BATCH_IMAGES)
        return np.concatenate(
            [encoder.vectors_from_pixels(np.stack(inputs[at : at + _BATCH_IMAGES])) for at in starts]
        )

    def write() -> None:
        ids = list(range(len(vectors)))
        part = EmbeddedPart(next(numbers), ids, vectors, [], Counts(rows=len(vectors)))
        writer.write(part)

    out = scratch / f"{modality.value}-parts"
    out.mkdir()
    numbers = itertools.count()
    writer = PartWriter(LocalStore(out), IdType.INT64, Encoding.FLOAT32, {})
    prepare, tower = (tokenise, text_tower) if modality is Modality.TEXT else (decoded, image_tower)
    items = read()
    inputs = prepare()
    vectors = tower()
    return dict(zip(STAGES[modality], (read, prepare, tower, write), strict=True))


def _whole(model: Path, source: Path, turns: int, cell: Callable[..., dict[str, str]]) -> list[Record]:
    """Measure the whole pipeline in wall time and in CPU time."""
    choice = EngineChoice(Engine.ONNXRUNTIME, Precision.FP32, instances=1, threads=1)
    by_wall, by_cpu = [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as out:
            record = embed_corpus(model, source, out, Options(engine=choice))
        by_wall.append(record.this_run.rows / record.seconds)
        by_cpu.append(record.this_run.rows / record.cpu_seconds)
    settings = {"threads": 1, "instances": 1, "turns": turns, "rows": record.this_run.rows}
    return [
        record_of(cell(load="pipeline by CPU"), by_cpu, unit="rows/core-second", settings=settings),
        record_of(cell(load="pipeline"), by_wall, unit="rows/s", settings=settings),
    ]


def print_stages(records: list[Record], console: Console) -> None:
    """Print one row per stage, with its share of the stages' CPU time."""
    table = Table("model", "tower", "stage", "rate", "95%", "unit", "share", box=box.SIMPLE_HEAD)
    for record in records:
        cell = record.cell
        stages = [
            other.median
            for other in records
            if other.cell["tower"] == cell["tower"] and not other.cell["load"].startswith("pipeline")
        ]
        share = 1 / record.median / sum(1 / rate for rate in stages)
        shown = "" if cell["load"].startswith("pipeline") else f"{share:.0%}"
        interval = bootstrap_median_interval(record.by_process)
        table.add_row(
            *(cell[key] for key in ("model", "tower", "load")),
            f"{record.median:,.0f}",
            f"{interval.low:,.0f}–{interval.high:,.0f}",
            record.unit,
            shown,
        )
    console.print(table)
