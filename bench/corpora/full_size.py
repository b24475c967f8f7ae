"""Measure corpus embedding with full-size towers: the pipeline beside common loops.

Weights are random, so INT8 figures show speed only. All ways take turns in rotation, each in a process of its
own; every turn embeds other rows than the turn before. Ratios are taken within a turn.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.corpora.inputs import CORPORA, LANGUAGE, photographs, texts_of
from bench.corpora.loops import LOOPS, TimedLoop, timed_loop
from bench.models.corpus_models import full_size_model
from bench.records.record import Record, record_of, suite_cell
from runtime.corpus.engines import EngineChoice, open_encoder, runs_at_once
from runtime.cosines import lowest_cosine
from runtime.errors import InputError
from runtime.machine import n_cores
from runtime.manifest import Engine, Precision

__all__ = ["IMAGE_MODEL", "TEXT_MODELS", "measure_images", "measure_texts"]

TEXT_MODELS = ("xlm-roberta-base-ViT-B-32", "nllb-clip-base")
IMAGE_MODEL = "xlm-roberta-base-ViT-B-32"
_FAMILIES = {"xlm-roberta-base-ViT-B-32": "capivara", "nllb-clip-base": "nllb-clip"}


@dataclass(slots=True)
class _Busy:
    """CPU seconds of this process, sampled every second.

    Sampling starts with the first full second after the model is open.
    """

    noted: list[tuple[float, float]] = field(default_factory=list)
    last: tuple[float, float] | None = None

    def note(self) -> None:
        self.noted.append(_now())

    def batch_done(self, n_rows: int, counts: Any) -> None:
        self.last = _now()

    def shares(self) -> tuple[float, ...]:
        """Return the busy share of all cores per second; the shorter one of the last batch is included."""
        if self.last is None:
            return ()
        times = [point for point in self.noted if point[0] < self.last[0]] + [self.last]
        spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]
        return tuple(cpu / wall / n_cores() for wall, cpu in spans if wall > 0.2)


def _now() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


@contextmanager
def _noted_each_second(busy: _Busy, opened: threading.Event) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        opened.wait()
        while not stop.wait(1.0):
            busy.note()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        opened.set()
        thread.join()


def _choice() -> EngineChoice:
    """Return INT8 on OpenVINO with one instance per core."""
    return EngineChoice(Engine.OPENVINO, Precision.INT8, instances=n_cores(), threads=1)


def _pipeline(model: Path, source: Path, n_vectors: int) -> TimedLoop:
    """Embed the corpus in INT8 on OpenVINO, one instance per core; return the first rows' vectors."""
    import pyarrow.parquet

    from runtime.corpus import Options, Watcher, embed_corpus

    busy, opened = _Busy(), threading.Event()
    watcher = Watcher(started=lambda *_: opened.set(), observe=busy.batch_done)
    with tempfile.TemporaryDirectory() as out, _noted_each_second(busy, opened):
        record = embed_corpus(
            model, source, out, Options(engine=_choice(), language=LANGUAGE), watcher=watcher
        )
        vectors = None
        if n_vectors:
            table = pyarrow.parquet.read_table(Path(out) / "part-00000.parquet").slice(0, n_vectors)
            flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(table), -1)
    padding = record.padding_share if record.this_run.tokens else None
    return TimedLoop(
        record.this_run.rows, record.seconds, record.cpu_seconds, padding, vectors, busy.shares()
    )


@dataclass(slots=True)
class _Way:
    """Results of all turns of one way to embed the corpus."""

    turns: list[TimedLoop] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Rows per core-second, turn by turn."""
        return [turn.rows / turn.cpu_seconds for turn in self.turns]

    @property
    def settings(self) -> dict[str, Any]:
        cores = n_cores()
        return {
            "turns": len(self.turns),
            "threads": cores,
            "rows": [turn.rows for turn in self.turns],
            "seconds": [turn.seconds for turn in self.turns],
            "cpu_seconds": [turn.cpu_seconds for turn in self.turns],
            "padding": [turn.padding for turn in self.turns],
            "busy_each_second": [list(turn.busy_each_second) for turn in self.turns],
        }


def measure_texts(
    name: str, work: Path, *, n_rows: int, n_loop_rows: int, turns: int, console: Console
) -> list[Record]:
    """Measure rows per core-second of the pipeline and the loops on both corpora.

    Args:
        n_rows: Texts in a turn of the pipeline; the loops embed the first ``n_loop_rows`` of them.
    """
    import pyarrow
    import pyarrow.parquet

    model = full_size_model(name, work)
    records: list[Record] = []
    with _process() as pipeline, _process() as loops:
        for corpus in CORPORA:
            ways: dict[str, _Way] = {way: _Way() for way in ("pipeline", *LOOPS)}
            for turn in range(turns):
                texts = texts_of(corpus, n_rows, seed=turn)
                source = work / f"{corpus}.parquet"
                pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
                ways["pipeline"].turns.append(pipeline(_pipeline, model, source, n_loop_rows))
                _print(console, name, corpus, "pipeline", ways["pipeline"].turns[-1])
                for way in LOOPS:
                    if not any(found.error for found in ways[way].turns):
                        found = loops(timed_loop, way, work / "checkpoints" / name, texts[:n_loop_rows])
                        ways[way].turns.append(found)
                        _print(console, name, corpus, way, found)
            records += [_text_record(name, corpus, way, ways) for way in ways]
            _print_ratios(console, ways)
    return records


def _text_record(name: str, corpus: str, way: str, ways: dict[str, _Way]) -> Record:
    measured, is_ours = ways[way], way == "pipeline"
    cell = suite_cell(
        suite="corpus",
        metric="rate",
        model=name,
        family=_FAMILIES[name],
        tower="text",
        by="babeltower" if is_ours else "torch" if way == "plain" else way,
        engine="openvino" if is_ours else "torch",
        precision="int8" if is_ours else "fp32",
        batch=None if is_ours else 32,
    )
    error, cosine = measured.turns[0].error, None
    if error is None:
        try:
            cosine = _min_cosine(way, ways)
        except InputError as undefined:
            error = str(undefined)
    return record_of(
        {**cell, "corpus": corpus, "way": way},
        [] if error else measured.rates,
        unit="rows/core-second",
        settings={} if error else {**measured.settings, "min_cosine": cosine},
        error=error,
    )


def _min_cosine(way: str, ways: dict[str, _Way]) -> float | None:
    """Return the lowest cosine to the plain loop; with random weights it says little of INT8.

    Raises:
        InputError: a vector is zero or not finite.
    """
    pairs = [
        (ours.vectors, plain.vectors)
        for ours, plain in zip(ways[way].turns, ways["plain"].turns, strict=False)
    ]
    cosines = [lowest_cosine(a, b) for a, b in pairs if a is not None and b is not None]
    return min(cosines) if cosines else None


def measure_images(work: Path, *, n_images: int, turns: int, console: Console) -> list[Record]:
    """Measure the pipeline on JPEGs of 640×480, beside the tower alone and preprocessing alone."""
    model = full_size_model(IMAGE_MODEL, work)
    folder = work / f"photographs-{n_images}"
    if not folder.is_dir():
        photographs(folder, n_images)
    alone = ("preprocessing", "preprocessing, Pillow alone", "decoding, Pillow alone")
    ways: dict[str, _Way] = {way: _Way() for way in ("pipeline", "tower alone", *alone)}
    with _process() as pipeline, _process() as tower, _process() as preprocessing:
        for _ in range(turns):
            for way, measured in ways.items():
                if way == "pipeline":
                    found = pipeline(_pipeline, model, folder, 0)
                elif way == "tower alone":
                    found = tower(_tower_alone, model)
                else:
                    found = preprocessing(_preprocessing, model, folder, way)
                measured.turns.append(found)
                _print(console, IMAGE_MODEL, "images", way, found)
    _print_ratios(console, ways)
    return [_image_record(way, measured) for way, measured in ways.items()]


def _image_record(way: str, measured: _Way) -> Record:
    has_tower = way in ("pipeline", "tower alone")
    cell = suite_cell(
        suite="corpus",
        metric="rate",
        model=IMAGE_MODEL,
        family=_FAMILIES[IMAGE_MODEL],
        tower="image",
        by="Pillow" if "Pillow" in way else "babeltower",
        engine="openvino" if has_tower else "",
        precision="int8" if has_tower else "",
    )
    settings = {**measured.settings, "threads": n_cores() if has_tower else 1}
    return record_of(
        {**cell, "corpus": "JPEG 640×480", "way": way},
        measured.rates,
        unit="rows/core-second",
        settings=settings,
    )


_ALONE_S = 4.0
_BATCH_IMAGES = 16
"""Images of one run, as many as in the pipeline's slices."""


def _tower_alone(model: Path) -> TimedLoop:
    """Run the image tower on prepared pixels, one instance per core."""
    encoder = _open_tower(model)
    size = encoder.manifest.image
    shape = (_BATCH_IMAGES, 3, size.height, size.width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    encoder.vectors_from_pixels(pixels)
    started, cpu_started = _now()
    n_runs = runs_at_once(lambda: encoder.vectors_from_pixels(pixels), instances=n_cores(), seconds=_ALONE_S)
    stopped, cpu_stopped = _now()
    return TimedLoop(n_runs * _BATCH_IMAGES, stopped - started, cpu_stopped - cpu_started)


_towers: dict[Path, Any] = {}


def _open_tower(model: Path) -> Any:
    if model not in _towers:
        _towers[model] = open_encoder(model, _choice(), None)
    return _towers[model]


def _preprocessing(model: Path, folder: Path, way: str) -> TimedLoop:
    """Decode and preprocess on one thread, with the runtime or with Pillow alone."""
    from runtime.manifest import Manifest
    from runtime.preprocessing.image import decode, pixels_from_image, pixels_from_source

    image = Manifest.read(model).image
    files = [path.read_bytes() for path in sorted(folder.iterdir())[:200]]
    runs: dict[str, Callable[[bytes], Any]] = {
        "preprocessing": lambda data: pixels_from_source(data, image),
        "preprocessing, Pillow alone": lambda data: pixels_from_image(decode(data), image),
        "decoding, Pillow alone": decode,
    }
    run = runs[way]
    run(files[0])
    started, cpu_started = _now()
    for data in files:
        run(data)
    stopped, cpu_stopped = _now()
    return TimedLoop(len(files), stopped - started, cpu_stopped - cpu_started)


@contextmanager
def _process() -> Iterator[Callable[..., TimedLoop]]:
    """Yield a function that runs calls one by one in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:

        def call(task: Callable[..., TimedLoop], *arguments: Any) -> TimedLoop:
            return pool.apply(task, arguments)

        yield call


def _print(console: Console, model: str, corpus: str, way: str, found: TimedLoop) -> None:
    if found.error is not None:
        console.print(f"{model} {corpus} {way}: {found.error}", markup=False, soft_wrap=True)
        return
    line = f"{model} {corpus:<9} {way:<27} {found.rows / found.cpu_seconds:8.2f} rows a core-second"
    line += f", {found.rows / found.seconds:8.2f} rows/s"
    if found.padding is not None:
        line += f", padding {found.padding:.1%}"
    if found.busy_each_second:
        line += f", busy {statistics.fmean(found.busy_each_second):.1%}"
    console.print(line, markup=False, soft_wrap=True, highlight=False)


def _print_ratios(console: Console, ways: dict[str, _Way]) -> None:
    ours = ways["pipeline"]
    for way, measured in ways.items():
        if way != "pipeline" and not measured.turns[0].error:
            console.print(f"  pipeline ÷ {way}: {_ratios(ours.rates, measured.rates)}", highlight=False)


def _ratios(ours: Sequence[float], others: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), within turns"
