"""Does memory grow with the corpus? Peak of a small sample model over corpora of generated rows.

python -m bench.corpus_memory --work FOLDER --rows 100000 --rows 10000000 --json RECORD.json
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.environment import environment

_MODEL = "capivara"
_CHECKPOINTS = Path(__file__).resolve().parent.parent / "samples" / "checkpoints"
_GROUP = 50_000
_WORDS = np.asarray(
    [
        "a",
        "red",
        "house",
        "under",
        "the",
        "old",
        "tree",
        "by",
        "small",
        "river",
        "with",
        "two",
        "birds",
        "and",
        "one",
        "cat",
    ]
)


def _write(path: Path, n_rows: int) -> None:
    """Distinct texts of 2 to 9 words."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
    random = np.random.default_rng(0)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, n_rows, _GROUP):
            ids = range(start, min(start + _GROUP, n_rows))
            words = random.choice(_WORDS, (len(ids), 8))
            lengths = random.integers(1, 9, len(ids))
            texts = [f"{i} {' '.join(row[:n])}" for i, row, n in zip(ids, words, lengths, strict=True)]
            writer.write_table(pyarrow.table([list(ids), texts], schema=schema))


def _embed(model: Path, source: Path, out: Path) -> dict[str, Any]:
    from runtime.backends import Engine
    from runtime.corpus import EngineChoice, Options, embed_corpus
    from runtime.corpus.engines import n_cores
    from runtime.embeddings import Encoding
    from runtime.manifest import Precision

    choice = EngineChoice(Engine.OPENVINO, Precision.FP32, instances=n_cores(), threads=1)
    record = embed_corpus(model, source, out, Options(engine=choice, encoding=Encoding.BINARY))
    return {
        "rows": record.total.rows,
        "peak_memory_bytes": record.peak_memory_bytes,
        "seconds": record.seconds,
        "cpu_seconds": record.cpu_seconds,
        "cores": record.cores,
        "padding_share": record.padding_share,
    }


def main(
    work: Annotated[Path, typer.Option(help="Folder for the model and the corpora.")],
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a corpus; may be repeated.")] = None,
    record: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Measure each corpus in a process of its own."""
    from export.repository import repository_from_checkpoint
    from runtime.manifest import manifest_path

    work.mkdir(parents=True, exist_ok=True)
    model = work / "repository" / _MODEL
    if not manifest_path(model).is_file():
        repository_from_checkpoint(_CHECKPOINTS / _MODEL, model.parent, name=_MODEL)
    found = []
    for n_rows in rows or [100_000, 10_000_000]:
        source, out = work / f"{n_rows}.parquet", work / f"out-{n_rows}"
        if not source.is_file():
            _write(source, n_rows)
        shutil.rmtree(out, ignore_errors=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(_embed, (model, source, out)))
        last = found[-1]
        typer.echo(
            f"{last['rows']:>12,} rows: {last['peak_memory_bytes'] / 1e6:,.0f} MB at most, "
            f"{last['rows'] / last['seconds']:,.0f} rows/s, padding {last['padding_share']:.1%}"
        )
    if record is not None:
        data = {"environment": dataclasses.asdict(environment()), "model": _MODEL, "runs": found}
        record.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
