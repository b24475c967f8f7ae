"""How fast a corpus is embedded: by stage on a sample, and beside the loops that people write at true size.

    python bench/corpus.py                                  a sample, stage by stage
    python -m bench.corpus --work FOLDER --json bench/results/corpus.json

With a work folder, at true size:

Texts: CLDR captions, and generated ones of realistic lengths; XLM-R base and NLLB-600M with random weights,
INT8 in the pipeline, FP32 PyTorch in the loops. Images: JPEGs of 640×480, ViT-B/32. Every cell has a
process of its own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray

from bench.corpus_models import full_size_model
from bench.corpus_stages import Corpus, measure_stages, print_stages
from bench.environment import environment
from bench.latency_tables import wide_console
from bench.records import write_records
from runtime.corpus.engines import n_cores
from samples import dataset

__all__ = ["Cell", "generated_texts", "photographs"]

TEXT_MODELS = ("xlm-roberta-base-ViT-B-32", "nllb-clip-base")
IMAGE_MODEL = "xlm-roberta-base-ViT-B-32"
CORPORA = ("captions", "generated")
WAYS = ("batch-maximum", "sorted", "context-length")
_BATCH = 32
_LANGUAGE = "eng_Latn"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement.

    Attributes:
        way: ``pipeline``, or the loop: pads each batch of 32 to its longest (``batch-maximum``), sorts all
            texts by length first as sentence-transformers does (``sorted``), or pads to the context length as
            open_clip does (``context-length``).
        rows_per_core_second: Rows ÷ CPU seconds of the process.
        busy: CPU seconds ÷ (seconds × cores).
        padding: Share of the computed tokens.
    """

    model: str
    corpus: str
    way: str
    rows: int
    seconds: float
    cpu_seconds: float
    rows_per_core_second: float
    busy: float
    padding: float | None


def generated_texts(n: int, *, seed: int = 0) -> list[str]:
    """Texts whose lengths spread as captions of photographs do: about 16 tokens, a long tail."""
    random = np.random.default_rng(seed)
    words = [word for caption in dataset.load_captions(_LANGUAGE) for word in caption.text.split()]
    lengths = np.clip(random.lognormal(2.2, 0.6, n), 2, 60).astype(int)
    return [" ".join(random.choice(words, length)) for length in lengths]


def photographs(folder: Path, n: int, *, seed: int = 0) -> None:
    """JPEGs of 640×480 with the detail, and so about the size, of photographs."""
    from PIL import Image

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        levels: NDArray[Any] = random.normal(128, 9, (480, 640, 3))
        for side in (4, 16, 64, 160):
            small = random.normal(0, 22, (480 // side + 1, 640 // side + 1, 3))
            levels += np.kron(small, np.ones((side, side, 1)))[:480, :640]
        file = io.BytesIO()
        Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        (folder / f"{i:05d}.jpg").write_bytes(file.getvalue())


def _texts(corpus: str, n: int) -> list[str]:
    if corpus == "generated":
        return generated_texts(n)
    captions = [caption.text for caption in dataset.load_captions()]
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[i] for i in order[:n]]


def _pipeline(model: Path, source: Path, corpus: str) -> Cell:
    from runtime.backends import Engine
    from runtime.corpus import EngineChoice, Options, embed_corpus
    from runtime.manifest import Precision

    choice = EngineChoice(Engine.OPENVINO, Precision.INT8, instances=n_cores(), threads=1)
    with tempfile.TemporaryDirectory() as out:
        record = embed_corpus(model, source, out, Options(engine=choice, language=_LANGUAGE))
    return Cell(
        model=model.name,
        corpus=corpus,
        way="pipeline",
        rows=record.this_run.rows,
        seconds=record.seconds,
        cpu_seconds=record.cpu_seconds,
        rows_per_core_second=record.this_run.rows / record.cpu_seconds,
        busy=record.cpu_seconds / record.seconds / record.cores,
        padding=record.padding_share if record.this_run.tokens else None,
    )


def _loops(checkpoint: Path, n_texts: int) -> list[Cell]:
    """Plain FP32 PyTorch loops over batches of 32, on every core."""
    from export.checkpoint import towers_from_checkpoint

    reference = towers_from_checkpoint(checkpoint).reference
    cells = []
    for corpus in CORPORA:
        texts = _texts(corpus, n_texts)
        ids = reference.token_ids(texts, [_LANGUAGE] * len(texts))
        pad_id = int(reference.tokenizer.tokenizer.pad_token_id)  # type: ignore[attr-defined]
        reference.text_vectors(ids[:_BATCH])
        cells += [
            _loop(reference, checkpoint.name, ids, (ids != pad_id).sum(axis=1), corpus, w) for w in WAYS
        ]
    return cells


def _loop(
    reference: Any, model: str, ids: NDArray[Any], lengths: NDArray[Any], corpus: str, way: str
) -> Cell:
    order = np.argsort(-lengths, kind="stable") if way == "sorted" else np.arange(len(ids))
    started, cpu_started, computed = time.perf_counter(), time.process_time(), 0
    for at in range(0, len(order), _BATCH):
        rows = order[at : at + _BATCH]
        width = ids.shape[1] if way == "context-length" else int(lengths[rows].max())
        computed += len(rows) * width
        reference.text_vectors(ids[rows, :width])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Cell(
        model=model,
        corpus=corpus,
        way=way,
        rows=len(ids),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        rows_per_core_second=len(ids) / cpu_seconds,
        busy=cpu_seconds / seconds / n_cores(),
        padding=1 - float(lengths.sum()) / computed,
    )


def _tower_alone(model: Path, n_images: int) -> Cell:
    """The image tower's own rate, on pixels that are ready."""
    from runtime.backends import Engine
    from runtime.corpus.engines import EngineChoice, rows_per_second
    from runtime.manifest import Modality, Precision

    cores = n_cores()
    choice = EngineChoice(Engine.OPENVINO, Precision.INT8, instances=cores, threads=1)
    rates = [rows_per_second(model, choice, Modality.IMAGE) for _ in range(5)]
    rate = sorted(rates)[2]
    return Cell(
        model.name,
        "images",
        "tower-alone",
        n_images,
        n_images / rate,
        cores * n_images / rate,
        rate / cores,
        1,
        None,
    )


def _preprocessing(model: Path, folder: Path, way: str) -> Cell:
    """Decoding and preprocessing on one thread: the runtime's, or Pillow alone."""
    from runtime.image import decode, pixels_from_image, pixels_from_source
    from runtime.manifest import Manifest

    image = Manifest.read(model).image
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    run: Callable[[bytes], Any] = lambda data: pixels_from_source(data, image)  # noqa: E731
    if way == "preprocessing-pillow":
        run = lambda data: pixels_from_image(decode(data), image)  # noqa: E731
    elif way == "decoding-pillow":
        run = decode
    run(files[0])
    started, cpu_started = time.perf_counter(), time.process_time()
    for data in files:
        run(data)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    rate = len(files) / cpu_seconds
    return Cell(
        model.name, "images", way, len(files), seconds, cpu_seconds, rate, cpu_seconds / seconds, None
    )


def _cells(task: Callable[..., Cell | list[Cell]], *arguments: Any) -> list[Cell]:
    """Run a task in a process of its own, and print what it found."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        done = pool.apply(task, arguments)
    cells = done if isinstance(done, list) else [done]
    for cell in cells:
        padding = "" if cell.padding is None else f", padding {cell.padding:.1%}"
        typer.echo(
            f"{cell.model:<26} {cell.corpus:<9} {cell.way:<20} "
            f"{cell.rows_per_core_second:8.1f} rows a core-second, "
            f"{cell.rows / cell.seconds:8.1f} rows/s, busy {cell.busy:.0%}{padding}"
        )
    return cells


def _text_cells(name: str, work: Path, n_pipeline: int, n_loop: int) -> list[Cell]:
    import pyarrow
    import pyarrow.parquet

    model = full_size_model(name, work)
    cells = []
    for corpus in CORPORA:
        source = work / f"{corpus}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": _texts(corpus, n_pipeline)}), source)
        cells += _cells(_pipeline, model, source, corpus)
    return cells + _cells(_loops, work / "checkpoints" / name, n_loop)


def _image_cells(work: Path, n_images: int) -> list[Cell]:
    model = full_size_model(IMAGE_MODEL, work)
    folder = work / f"photographs-{n_images}"
    if not folder.is_dir():
        photographs(folder, n_images)
    ways = ("preprocessing", "preprocessing-pillow", "decoding-pillow")
    return [
        *_cells(_pipeline, model, folder, "images"),
        *_cells(_tower_alone, model, n_images),
        *(cell for way in ways for cell in _cells(_preprocessing, model, folder, way)),
    ]


def _by_stage(sample: str, record: Path) -> None:
    console = wide_console()
    records = measure_stages(sample, Corpus(), console)
    write_records(records, record)
    print_stages(records, console)
    console.print(f"records  {record}", markup=False, soft_wrap=True)


def main(
    sample: Annotated[
        str, typer.Argument(help="Measured by stage where no work folder is named.")
    ] = "nllb-clip",
    work: Annotated[
        Path | None,
        typer.Option(help="Measure at true size; folder of models and corpora, kept, some 12 GB."),
    ] = None,
    texts: Annotated[int, typer.Option(help="Rows of the pipeline.")] = 4_000,
    loop_texts: Annotated[int, typer.Option(help="Rows of a loop.")] = 192,
    images: Annotated[int, typer.Option(help="JPEGs.")] = 600,
    only: Annotated[str | None, typer.Option(help="A model's name, or images.")] = None,
    record: Annotated[Path | None, typer.Option("--json", help="Add the cells to this file.")] = None,
) -> None:
    """Measure, print, keep."""
    if work is None:
        _by_stage(sample, record or Path("build/bench/corpus.json"))
        return
    cells: list[Cell] = []
    for name in TEXT_MODELS:
        if only in (None, name):
            cells += _text_cells(name, work, texts, loop_texts)
    if only in (None, "images"):
        cells += _image_cells(work, images)
    if record is not None:
        data = {
            "environment": dataclasses.asdict(environment()),
            "cells": [dataclasses.asdict(c) for c in cells],
        }
        runs = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
        record.write_text(json.dumps([*runs, data], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
