"""Building of an index from vectors: train, fill block by block, measure, publish by a rename."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.journal import computations_of_folder
from runtime.counts import require_threads
from runtime.errors import InputError
from runtime.extras import faiss
from runtime.fingerprints import remark_on_vectors
from runtime.indexes import faiss_index
from runtime.indexes.exact import Nearest
from runtime.indexes.folder import IdsFile, require_free, written_to
from runtime.indexes.memory import require_memory
from runtime.indexes.plan import Kind, Plan, Settings
from runtime.indexes.recall import IndexedRows, K, best_point, points_from_index
from runtime.indexes.record import (
    IDS_FILE,
    INDEX_FILE,
    TRAINED_FILE,
    VERSION,
    IndexedPart,
    IndexRecall,
    IndexRecord,
    OperatingPoint,
    Segment,
)
from runtime.indexes.shards import VectorShards
from runtime.machine import n_cores
from runtime.storage import sha256_of_file, staged_folder

__all__ = ["Progress", "index_from_vectors", "parts_of_shards"]

Progress = Callable[[str, int, int], None]
"""Callback with a step's name, the finished count and the total, in rows or queries."""


def index_from_vectors(
    vectors: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: Kind = Kind.FLAT,
    settings: Settings | None = None,
    queries: str | os.PathLike[str] | None = None,
    n_queries: int = 1_000,
    target_recall: float = 0.99,
    seed: int = 0,
    threads: int | None = None,
    replace: bool = False,
    progress: Progress = lambda _step, _done, _of: None,
) -> IndexRecord:
    """Build an index over embedded vectors, and measure it against exact search.

    Randomly drawn rows are held out of training and of the index during the measurement, so that no query
    finds itself; they are added afterwards. Vectors are read block by block: memory holds the index, the
    training rows and the queries.

    Args:
        vectors: Folder written by ``babeltower embed``, or one of its Parquet files.
        out: Folder to write: ``index.faiss``, ``ids.arrow`` (ids and kept columns) and ``index.json``.
        queries: Query vectors of the same space for the measurement; default: held-out rows. Text vectors are
            distributed differently from image vectors, so measure an image index for text search with texts.
        n_queries: Queries in the measurement; at most a tenth of the rows is held out.
        target_recall: Target recall@10 for choosing the search effort.
        seed: Seed of random draws. A graph built by several threads still differs between runs.
        threads: Threads of FAISS; default: every core.
        replace: Allow replacing an existing index.

    Raises:
        InputError: the vectors are unreadable or inconsistent; a setting does not fit them; there are too few
            to train on or too many for the memory; or ``out`` exists. No index is written then.
        EngineError: FAISS or pyarrow is not installed.
        OutputFaultError: the disk is full, or failed; an index that was there before is kept.
    """
    if n_queries < 1 or not 0 < target_recall <= 1:
        raise InputError(
            f"n_queries is {n_queries} and target_recall {target_recall}; expected at least 1, and 0 to 1."
        )
    require_threads(threads)
    shards = VectorShards.open(vectors)
    asked = None if queries is None else _questions_from_folder(Path(queries), shards, n_queries, seed)
    target = Path(out)
    require_free(target, replace=replace)
    n_held_out = 0 if asked is not None or len(shards) < 2 else min(n_queries, max(len(shards) // K, 1))
    plan = Plan.of(
        kind, shards.space, settings=settings or Settings(), n_rows=len(shards) - n_held_out, seed=seed
    )
    require_memory(plan, len(shards))
    drawn = np.random.default_rng(seed).choice(len(shards), n_held_out + plan.n_training_rows, replace=False)
    with (
        written_to(target, "Free space, or choose another folder."),
        staged_folder(target, before_rename=lambda: require_free(target, replace=replace)) as folder,
    ):
        build = _Build(
            plan=plan,
            shards=shards,
            held_out=np.sort(drawn[:n_held_out]),
            training=np.sort(drawn[n_held_out:]),
            asked=asked,
            n_threads=faiss_index.use_threads(threads or n_cores()),
            progress=progress,
        )
        record = build.into(folder, target_recall, effort=settings.effort if settings else None)
        record.write(folder)
    return record


def _questions_from_folder(folder: Path, shards: VectorShards, n: int, seed: int) -> _Asked:
    questions = VectorShards.open(folder)
    if questions.space != shards.space:
        raise InputError(
            f"The queries are from another space: {folder} has {questions.space}, {shards.location} has "
            f"{shards.space}. Embed both with the same model, width and encoding."
            + remark_on_vectors(shards.space.fingerprint, questions.space.fingerprint)
        )
    chance = np.random.default_rng(seed)
    numbers = np.sort(chance.choice(len(questions), min(n, len(questions)), replace=False))
    return _Asked(str(folder), questions.rows(numbers))


@dataclass(frozen=True, slots=True)
class _Asked:
    origin: str
    stored: NDArray[Any]


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = now - self._since
        self._since = now


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """Build of one index into a folder.

    Attributes:
        held_out: int64, ascending: rows used as queries first and added last.
        training: int64, ascending: training rows, disjoint from ``held_out``.
        asked: Query vectors given by the caller, instead of held-out rows.
    """

    plan: Plan
    shards: VectorShards
    held_out: NDArray[np.int64]
    training: NDArray[np.int64]
    asked: _Asked | None
    n_threads: int
    progress: Progress
    clock: _Clock = field(default_factory=_Clock)

    def into(self, folder: Path, target_recall: float, *, effort: int | None) -> IndexRecord:
        space = self.shards.space
        index = self._trained_index()
        if len(self.training):
            faiss_index.save(index, folder / TRAINED_FILE)
        asked = self.asked or _Asked("held-out rows", self.shards.rows(self.held_out))
        queries = space.decoded_queries(asked.stored)
        self.clock.lap("read queries")
        nearest = Nearest(len(queries), K)
        with IdsFile.create(folder / IDS_FILE, self.shards.shards[0].schema) as rows:
            last_rows = self._fill(index, queries, nearest, rows)
            self.clock.lap("add")
            points = self._measured(index, queries, nearest, effort)
            self.clock.lap("measure")
            if len(self.held_out):
                faiss_index.add(index, space, asked.stored)
                for held, part in last_rows:
                    rows.write(held, np.full(held.num_rows, part, dtype=np.int32))
        self.progress("writing", 0, len(self.shards))
        faiss_index.save(index, folder / INDEX_FILE)
        self.clock.lap("write")
        recall = IndexRecall(nearest.rows.shape[1], len(queries), asked.origin, self.n_threads, points)
        chosen = (
            best_point(points, target_recall).effort if points else effort or (self.plan.efforts() or [0])[0]
        )
        return self._record(folder, recall, chosen)

    def _trained_index(self) -> Any:
        index = faiss_index.index_from_plan(self.plan)
        if len(self.training):
            self.progress("training", 0, len(self.training))
            faiss_index.train(index, self.shards.space.decoded(self.shards.rows(self.training)))
            self.clock.lap("train")
        return index

    def _fill(
        self, index: Any, queries: NDArray[np.float32], nearest: Nearest, rows: IdsFile
    ) -> list[tuple[Any, int]]:
        """Add all rows except the held-out ones, and return the ids and parts of the latter."""
        space, start = self.shards.space, 0
        last_rows = []
        blocks = ((n, block) for n, shard in enumerate(self.shards.shards) for block in shard.blocks())
        for part, block in blocks:
            end = start + len(block.vectors)
            low, high = np.searchsorted(self.held_out, [start, end])
            kept = np.ones(len(block.vectors), dtype=np.bool_)
            kept[self.held_out[low:high] - start] = False
            vectors = block.vectors[kept]
            faiss_index.add(index, space, vectors)
            nearest.see(space.scale * (queries @ space.decoded(vectors).T))
            rows.write(block.rows.filter(kept), np.full(len(vectors), part, dtype=np.int32))
            last_rows.append((block.rows.filter(~kept), part))
            start = end
            self.progress("adding", start, len(self.shards))
        return last_rows

    def _measured(
        self, index: Any, queries: NDArray[np.float32], nearest: Nearest, effort: int | None
    ) -> tuple[OperatingPoint, ...]:
        if not nearest.rows.size:
            return ()
        self.progress("measuring", 0, len(queries))
        rows = IndexedRows(self.shards, self.held_out)
        return points_from_index(index, self.plan, queries, nearest, rows, effort=effort)

    def _record(self, folder: Path, recall: IndexRecall, effort: int) -> IndexRecord:
        shards, space = self.shards, self.shards.space
        return IndexRecord(
            version=VERSION,
            kind=self.plan.kind.value,
            parameters=self.plan.parameters,
            effort=effort,
            n_rows=len(shards),
            n_well_trained_rows=self.plan.n_well_trained_rows,
            fingerprint=space.fingerprint,
            dim=space.dim,
            encoding=space.encoding.value,
            model=shards.model,
            modality=shards.modality,
            source=shards.source,
            file_bytes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            recall=recall,
            seconds={step: round(spent, 3) for step, spent in self.clock.seconds.items()},
            seed=self.plan.seed,
            faiss=str(faiss().__version__),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            computations=tuple(computations_of_folder(shards.location)),
            file_sha256={path.name: sha256_of_file(path) for path in sorted(folder.iterdir())},
            segments=(Segment(INDEX_FILE, IDS_FILE, len(shards)),),
            parts=tuple(parts_of_shards(shards, first=0)),
        )


def parts_of_shards(shards: VectorShards, *, first: int) -> Iterator[IndexedPart]:
    """Describe the files of vectors that an index holds, numbered from ``first``."""
    for number, shard in enumerate(shards.shards, first):
        yield IndexedPart(number, shard.path.name, shard.sha256 or sha256_of_file(shard.path), shard.n_rows)
