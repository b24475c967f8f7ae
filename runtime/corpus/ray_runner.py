"""Corpus pipeline on Ray Data: tasks read and prepare, actors hold the model, the driver writes.

The result for a slice does not depend on where or when it is computed, and only the driver writes parts, so
the output equals that of a local run. If a worker dies, Ray replaces it and recomputes its slices. If the
driver dies, the same command resumes from the journal.
"""

from __future__ import annotations

import os
import pickle
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.computation import Computation, computation_of, require_acceptable
from runtime.corpus.engines import EngineChoice, open_encoder
from runtime.corpus.job import Executor, Job, preparation_for, slices_of_rows
from runtime.corpus.options import Options
from runtime.corpus.pipeline import EmbeddedPart, PartAssembly
from runtime.corpus.slices import Preparation, PreparedSlice, Slice
from runtime.corpus.sources import NumberedRows, Source, SourceFormat
from runtime.errors import BabeltowerError, CorpusError
from runtime.extras import import_optional
from runtime.local import LocalEncoder
from runtime.machine import n_cores
from runtime.opening.tower_check import Checks

__all__ = ["ray_executor"]

_READER_CPUS, _TASK_CPUS, _ACTOR_CPUS = 0.1, 0.2, 0.6
"""CPU shares requested from Ray; an actor and a few tasks fit on one core. Readers request another share than
other tasks, since Ray fuses steps with equal needs, and then a file would be decoded by its reader alone."""


def ray_executor(n_workers: int | None = None) -> Executor:
    """Return an executor on a Ray cluster: the connected one, the one in ``RAY_ADDRESS``, or a local one.

    Args:
        n_workers: Actors that hold the model; default: one per core of the cluster.

    Raises:
        MissingPackageError: Ray is not installed.
    """
    import_optional("ray.data", "The Ray runner", "babeltower[ray]")
    return partial(_parts_on_ray, n_workers=n_workers)


@dataclass(frozen=True, slots=True)
class _Work:
    """Picklable description of the job, sent to every worker."""

    model: str
    source: Source
    options: Options
    choice: EngineChoice
    dim: int
    pending: frozenset[int]
    computation: Computation

    def pieces(self, first_file: int, first_row: int, n_rows: int) -> Iterator[Slice]:
        """Yield slices of the pending parts that begin in one file; the last may extend into later files."""
        size = self.options.rows_per_part
        first, last = -(-first_row // size), -(-(first_row + n_rows) // size)

        def needs(start: int, stop: int) -> bool:
            parts = range(max(first, start // size), min(last, -(-stop // size)))
            return any(part in self.pending for part in parts)

        rows = NumberedRows(self.source, needs, first_file=first_file, first_row=first_row)
        own = (piece for piece in rows if piece.start < last * size)
        preparation = _preparation(self)
        slices = (
            (part, piece)
            for part, piece in slices_of_rows(preparation.shortened(own), self.source.modality, size)
            if first <= part < last and part in self.pending
        )
        return preparation.deduplicated(slices)


@lru_cache(maxsize=2)
def _tokenizing_encoder(model: str, choice: EngineChoice, language: str | None) -> LocalEncoder:
    """Open an encoder for tokenizing only: no graph is opened, and only the tokenizer's checksum verified."""
    encoder = open_encoder(model, choice, language, checks=Checks.OPENING)
    encoder.verify_tokenizer()
    return encoder


def _preparation(work: _Work) -> Preparation:
    """Return this worker's preparation; its encoder opens no graph for tokenizing."""
    choice = replace(work.choice, measured=None, reasons=())
    encoder = _tokenizing_encoder(work.model, choice, work.options.language)
    return preparation_for(encoder, work.source.modality, work.options)


def _read(row: dict[str, Any], sent: Any) -> Iterator[dict[str, Any]]:
    for piece in _unpacked(sent).pieces(row["file"], row["first_row"], row["n_rows"]):
        yield {"data": pickle.dumps(piece, protocol=5)}


def _read_batch(batch: dict[str, Any], sent: Any) -> Iterator[dict[str, Any]]:
    for file, first_row, n_rows in zip(batch["file"], batch["first_row"], batch["n_rows"], strict=True):
        row = {"file": int(file), "first_row": int(first_row), "n_rows": int(n_rows)}
        for found in _read(row, sent):
            yield {"data": _column(found["data"])}


def _prepare(batch: dict[str, Any], sent: Any) -> dict[str, Any]:
    preparation = _preparation(_unpacked(sent))
    (data,) = batch["data"]
    return {"data": _column(pickle.dumps(preparation.prepared(pickle.loads(data)), protocol=5))}


class _Embedder:
    """Ray actor with one model, opened once after this machine's copy of its files is verified.

    The tower is checked on this machine before its first batch.
    """

    def __init__(self, sent: Any) -> None:
        work = _unpacked(sent)
        choice = replace(work.choice, instances=1)
        self._dim = work.dim
        self._refusal: _Refusal | None = None
        try:
            self._encoder = open_encoder(work.model, choice, work.options.language, cache=work.options.cache)
            self._encoder.open_tower(work.source.modality)
            own = computation_of(self._encoder, choice, work.source.modality)
            accepted = work.options.accept_changed
            require_acceptable([work.computation], own, accepted, holder="Another worker")
        except BabeltowerError as error:  # if raised here, Ray would report only a dead actor
            self._refusal = _Refusal(platform.node(), error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (data,) = batch["data"]
        return {
            "data": _column(pickle.dumps(self._refusal or self._embedded(pickle.loads(data)), protocol=5))
        }

    def _embedded(self, prepared: PreparedSlice) -> PreparedSlice | _Refusal:
        try:
            vectors = [
                _Computed(found.rows, found.counts, found.run(self._encoder, self._dim))
                for found in prepared.batches
            ]
        except BabeltowerError as error:
            return _Refusal(platform.node(), error)
        return replace(prepared, batches=vectors)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Error sent instead of vectors by a worker that failed or whose model is wrong on its machine."""

    machine: str
    error: BabeltowerError


def _sent_back(data: bytes) -> PreparedSlice:
    """Unpack a worker's result for a slice.

    Raises:
        CorpusError: the worker sent a refusal.
    """
    found: PreparedSlice | _Refusal = pickle.loads(data)
    if isinstance(found, _Refusal):
        raise CorpusError(f"The worker on {found.machine} cannot embed: {found.error}") from found.error
    return found


@dataclass(frozen=True, slots=True)
class _Computed:
    """Batch with computed vectors."""

    rows: NDArray[np.int64]
    counts: Any
    vectors: NDArray[np.float32]

    def run(self, encoder: LocalEncoder, dim: int) -> NDArray[np.float32]:
        return self.vectors


def _column(data: bytes) -> NDArray[Any]:
    column = np.empty(1, dtype=object)
    column[0] = data
    return column


@lru_cache(maxsize=2)
def _unpacked(sent: Any) -> _Work:
    work: _Work = pickle.loads(sent)
    return work


def _parts_on_ray(job: Job, *, n_workers: int | None) -> Iterator[EmbeddedPart]:
    """Run a job on Ray, yielding parts as they finish."""
    import ray
    import ray.data

    if job.source.format is SourceFormat.ITEMS:
        raise CorpusError("Ray workers cannot read a Python iterable. Write it to a file, or embed locally.")
    if not ray.is_initialized():
        ray.init(num_cpus=None if _has_cluster() else max(n_cores(), n_workers or 0), log_to_driver=False)
    n_actors = n_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    counts = _rows_of_files(ray, job.source)
    job.n_rows = sum(counts)
    size = job.options.rows_per_part
    parts = frozenset(part for part in range(-(-job.n_rows // size)) if job.claim(part))
    sent = pickle.dumps(
        _Work(job.model, job.source, job.options, job.choice, job.dim, parts, job.computation)
    )
    starts = [sum(counts[:i]) for i in range(len(counts))]
    items = [
        {"file": i, "first_row": start, "n_rows": count}
        for i, (start, count) in enumerate(zip(starts, counts, strict=True))
        if any(part in parts for part in range(-(-start // size), -(-(start + count) // size)))
    ]
    if not items:
        return
    with ray.data.DataContext.current(_context(ray)):
        done = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(_read_batch, batch_size=1, fn_kwargs={"sent": sent}, num_cpus=_READER_CPUS)
            .map_batches(_prepare, batch_size=1, fn_kwargs={"sent": sent}, num_cpus=_TASK_CPUS)
            .map_batches(
                _Embedder,
                batch_size=1,
                fn_constructor_args=(sent,),
                compute=ray.data.ActorPoolStrategy(size=n_actors),
                num_cpus=_ACTOR_CPUS,
            )
        )
    yield from _assembled(job, (_sent_back(row["data"]) for row in done.iter_rows()))


def _context(ray: Any) -> Any:
    """Copy the caller's Ray Data settings, changed so that every slice is its own block.

    Ray passes blocks, not rows, between workers: with blocks of many slices, one worker would process a
    whole file.
    """
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1
    return context


def _has_cluster() -> bool:
    return "RAY_ADDRESS" in os.environ


def _rows_of_files(ray: Any, source: Source) -> list[int]:
    """Return the rows of each file; files that must be read are counted by Ray tasks."""
    known = [source.n_rows(file) for file in range(source.n_files)]
    count = ray.remote(num_cpus=_READER_CPUS)(_count_rows)
    asked = {file: count.remote(source, file) for file, n_rows in enumerate(known) if n_rows is None}
    return [ray.get(asked[file]) if n_rows is None else n_rows for file, n_rows in enumerate(known)]


def _count_rows(source: Source, file: int) -> int:
    n_rows = 0
    for rows in source.read(file, lambda start, stop: False):
        n_rows = rows.stop
    return n_rows


def _assembled(job: Job, slices: Iterator[PreparedSlice]) -> Iterator[EmbeddedPart]:
    open_parts: dict[int, PartAssembly] = {}
    size = job.options.rows_per_part
    for prepared in slices:
        if prepared.part not in open_parts:
            open_parts[prepared.part] = PartAssembly(prepared.part, prepared.part * size, job.dim, size)
            open_parts[prepared.part].end_at(min((prepared.part + 1) * size, job.n_rows))
        part = open_parts[prepared.part]
        part.add_slice(prepared)
        job.observe(prepared.counts.bad + prepared.counts.duplicates, prepared.counts)
        for batch in prepared.batches:
            part.add_vectors(batch.rows, batch.counts, batch.run(job.encoder, job.dim))
            job.observe(len(batch.rows), batch.counts)
        if part.is_complete:
            yield open_parts.pop(prepared.part).finished(has_ids=job.has_ids)
