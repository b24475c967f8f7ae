"""Measure peak memory against corpus size, with a small sample model and generated rows.

    python -m bench.corpus_memory --work FOLDER --json bench/results/corpus_memory.json

Each corpus is embedded in a process of its own, whose own peak is recorded (``VmHWM``). Rows are distinct, so
that every one is embedded: short texts, and at last a few of 200 kB.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer

from bench.models.samples import sample_checkpoint
from bench.records.record import Record, record_of, suite_cell, write_records
from runtime.storage import replace_file

_MODEL, _FAMILY = "capivara", "capivara"
_GROUP = 50_000
_SENTENCE = "a red house under the old tree by small river with two birds and one cat"
_WORDS = np.asarray(_SENTENCE.split())
_LONGEST = 4
_LONG_CHARACTERS = 200_000


def _write(path: Path, n_rows: int, *, is_long: bool) -> None:
    """Write distinct texts: the row's number and one to four words, or words of 200 kB."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
    random = np.random.default_rng(0)

    def texts(ids: range) -> list[str]:
        if is_long:
            return [(f"{i} {_SENTENCE} " + f"{_SENTENCE} " * 3_000)[:_LONG_CHARACTERS] for i in ids]
        words = random.choice(_WORDS, (len(ids), _LONGEST))
        lengths = random.integers(1, _LONGEST, len(ids), endpoint=True)
        return [f"{i} {' '.join(row[:n])}" for i, row, n in zip(ids, words, lengths, strict=True)]

    def write(unfinished: Path) -> None:
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, n_rows, _GROUP):
                ids = range(start, min(start + _GROUP, n_rows))
                writer.write_table(pyarrow.table([list(ids), texts(ids)], schema=schema))

    replace_file(path, write)


def _embed(model: Path, source: Path, out: Path) -> dict[str, Any]:
    from runtime.corpus import EngineChoice, Options, embed_corpus
    from runtime.embeddings import Encoding
    from runtime.machine import n_cores
    from runtime.manifest import Engine, Precision

    choice = EngineChoice(Engine.OPENVINO, Precision.FP32, instances=n_cores(), threads=1)
    record = embed_corpus(model, source, out, Options(engine=choice, encoding=Encoding.BINARY))
    return {
        "rows": record.total.rows,
        "duplicates": record.total.duplicates,
        "peak_memory_bytes": record.peak_memory_bytes,
        "seconds": record.seconds,
        "cpu_seconds": record.cpu_seconds,
        "padding_share": record.padding_share,
    }


def _record(corpus: str, found: dict[str, Any]) -> Record:
    cell = suite_cell(
        suite="corpus",
        metric="resident",
        model=_MODEL,
        family=_FAMILY,
        tower="text",
        engine="openvino",
        precision="fp32",
    )
    peak = found.pop("peak_memory_bytes") / 1e6
    return record_of(
        {**cell, "corpus": corpus, "way": "pipeline, peak", "rows": str(found["rows"])},
        [peak],
        unit="MB",
        settings=found,
    )


def main(
    work: Annotated[Path, typer.Option(help="Folder for the model and the corpora.")],
    rows: Annotated[list[int] | None, typer.Option(help="Corpus size in rows; may be repeated.")] = None,
    long: Annotated[int, typer.Option(help="Number of texts of 200 kB in the last corpus; 0: none.")] = 1_500,
    json: Annotated[Path | None, typer.Option(help="Write the records to this file.")] = None,
) -> None:
    """Measure each corpus in a process of its own."""
    from export.repository import repository_from_checkpoint
    from runtime.manifest import manifest_path

    work.mkdir(parents=True, exist_ok=True)
    model = work / "repository" / _MODEL
    if not manifest_path(model).is_file():
        repository_from_checkpoint(sample_checkpoint(_MODEL), model.parent, name=_MODEL)
    records: list[Record] = []
    corpora = [(n_rows, False) for n_rows in rows or [100_000, 10_000_000]]
    for n_rows, is_long in [*corpora, (long, True)] if long else corpora:
        name = f"{n_rows}-long" if is_long else str(n_rows)
        source, out = work / f"{name}.parquet", work / f"out-{name}"
        if not source.is_file():
            _write(source, n_rows, is_long=is_long)
        shutil.rmtree(out, ignore_errors=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(_embed, (model, source, out))
        rate, padding = found["rows"] / found["seconds"], found["padding_share"]
        records.append(_record("generated, 200 kB a text" if is_long else "generated, distinct", found))
        peak, what = records[-1].median, "texts of 200 kB" if is_long else "rows"
        typer.echo(
            f"{n_rows:>12,} {what}: {peak:,.0f} MB at most, {peak / records[0].median:.2f} times the first; "
            f"{rate:,.0f} rows/s, padding {padding:.1%}"
        )
        if json is not None:
            write_records(records, json)


if __name__ == "__main__":
    typer.run(main)
