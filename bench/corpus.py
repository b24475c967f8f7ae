"""Measure corpus embedding: by stage on a sample, or at full size beside common loops.

    python -m bench.corpus --json build/bench/corpus.json
    python -m bench.corpus --work FOLDER --json bench/results/corpus.json

At full size: CLDR captions and generated texts through XLM-R base and NLLB-600M, JPEGs of 640×480 through
ViT-B/32, INT8 in the pipeline, FP32 PyTorch in the loops. With --only, the file's other records are kept if
they are of this machine and commit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from bench.corpora.full_size import TEXT_MODELS, measure_images, measure_texts
from bench.corpora.stages import Corpus, measure_stages, print_stages
from bench.records.record import Record, records_to_keep, write_records
from bench.reporting.latency_tables import wide_console


def _by_stage(sample: str, record: Path) -> None:
    console = wide_console()
    records = measure_stages(sample, Corpus(), console)
    write_records(records, record)
    print_stages(records, console)
    console.print(f"records  {record}", markup=False, soft_wrap=True)


def _at_true_size(
    work: Path, only: str | None, texts: int, loop_texts: int, images: int, turns: int
) -> list[Record]:
    console, records = wide_console(), []
    for name in TEXT_MODELS:
        if only in (None, name):
            records += measure_texts(
                name, work, n_rows=texts, n_loop_rows=loop_texts, turns=turns, console=console
            )
    if only in (None, "images"):
        records += measure_images(work, n_images=images, turns=turns, console=console)
    return records


def _is_of(record: Record, only: str | None) -> bool:
    image = record.cell["tower"] == "image"
    return only is None or (image if only == "images" else not image and record.cell["model"] == only)


def main(
    sample: Annotated[str, typer.Argument(help="Sample to measure by stage, without --work.")] = "nllb-clip",
    work: Annotated[
        Path | None,
        typer.Option(help="Measure at full size; folder of models and corpora, kept, some 12 GB."),
    ] = None,
    texts: Annotated[int, typer.Option(help="Rows in a turn of the pipeline.")] = 4_000,
    loop_texts: Annotated[int, typer.Option(help="Rows in a turn of a loop, taken from those.")] = 64,
    images: Annotated[int, typer.Option(help="Number of JPEGs.")] = 600,
    turns: Annotated[int, typer.Option(help="Turns of each way.", min=1)] = 3,
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(TEXT_MODELS)}, images.")] = None,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Measure corpus embedding, print the results and write the records."""
    if work is None:
        _by_stage(sample, record or Path("build/bench/corpus.json"))
        return
    kept = [] if record is None else records_to_keep(record, lambda old: _is_of(old, only))
    records = _at_true_size(work, only, texts, loop_texts, images, turns)
    if record is not None:
        write_records([*kept, *records], record)


if __name__ == "__main__":
    typer.run(main)
