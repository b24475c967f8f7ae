"""Measure scaling on Ray: the same corpus with one worker and with two, in turns.

    python -m bench.corpus_ray --work FOLDER --json bench/results/corpus_ray.json

XLM-R base with random weights in INT8, generated texts in small parts. A run's rate is measured from its
first written part to its last, without the start of its workers; the rate of the whole run is kept too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from bench.corpora.inputs import LANGUAGE, texts_of
from bench.models.corpus_models import full_size_model
from bench.records.record import Record, record_of, suite_cell, write_records
from runtime.corpus import EngineChoice, Options, Watcher, embed_corpus
from runtime.corpus.journal import PartRecord
from runtime.corpus.ray_runner import ray_executor
from runtime.machine import n_cores
from runtime.manifest import Engine, Precision

_MODEL, _FAMILY = "xlm-roberta-base-ViT-B-32", "capivara"
_ROWS_PER_PART = 128


def _run(model: Path, source: Path, n_workers: int) -> tuple[float, float]:
    """Return rows per second from the first part to the last, and of the whole run."""
    written: list[tuple[float, int]] = []

    def part_done(record: PartRecord) -> None:
        written.append((time.perf_counter(), record.rows))

    choice = EngineChoice(Engine.OPENVINO, Precision.INT8, instances=1, threads=1)
    options = Options(engine=choice, language=LANGUAGE, rows_per_part=_ROWS_PER_PART)
    with tempfile.TemporaryDirectory() as out:
        record = embed_corpus(
            model, source, out, options, watcher=Watcher(part_done=part_done), execute=ray_executor(n_workers)
        )
    rows = sum(n for _, n in written[1:])
    return rows / (written[-1][0] - written[0][0]), record.this_run.rows / record.seconds


def _record(n_workers: int, rates: list[tuple[float, float]], n_rows: int) -> Record:
    cell = suite_cell(
        suite="corpus",
        metric="rate",
        model=_MODEL,
        family=_FAMILY,
        tower="text",
        engine="openvino",
        precision="int8",
    )
    return record_of(
        {**cell, "corpus": "generated", "way": f"Ray, workers: {n_workers}"},
        [steady for steady, _ in rates],
        unit="rows/s",
        settings={"workers": n_workers, "rows": n_rows, "whole_run": [whole for _, whole in rates]},
    )


def main(
    work: Annotated[Path, typer.Option(help="Folder of the model, kept.")],
    rows: Annotated[int, typer.Option(help="Texts of a run.")] = 3_072,
    turns: Annotated[int, typer.Option(help="Runs with each number of workers.", min=1)] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the records to this file.")] = None,
) -> None:
    """Measure one worker and two, print the rates and write the records."""
    import pyarrow
    import pyarrow.parquet
    import ray

    model = full_size_model(_MODEL, work)
    ray.init(address="local", num_cpus=n_cores(), include_dashboard=False, log_to_driver=False)
    rates: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for turn in range(turns):
        source = work / "ray.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts_of("generated", rows, seed=turn)}), source)
        for n_workers, found in rates.items():
            found.append(_run(model, source, n_workers))
            typer.echo(f"{n_workers} workers: {found[-1][0]:.1f} rows/s, whole run {found[-1][1]:.1f}")
    times = [two[0] / one[0] for one, two in zip(rates[1], rates[2], strict=True)]
    typer.echo(f"two workers ÷ one, within turns: {statistics.median(times):.2f}")
    if json is not None:
        write_records([_record(n, found, rows) for n, found in rates.items()], json)


if __name__ == "__main__":
    typer.run(main)
