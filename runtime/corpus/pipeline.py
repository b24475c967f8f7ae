"""Concurrent reading, preparation and inference, on threads joined by bounded queues.

reader → slices → preparers → prepared slices → one feed → towers → vectors → parts, in order

Every long step (reading, tokenizing, decoding, the tower) releases the GIL, so threads use all cores.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.pictures import Picture
from runtime.corpus.rows import BadRow, Problem, Rows
from runtime.corpus.slices import BAD, Batch, Counts, Preparation, PreparedSlice, Slice, digest_of_part
from runtime.encoder import Encoder
from runtime.errors import InputFaultError

__all__ = [
    "OPEN_PARTS",
    "EmbeddedPart",
    "Observer",
    "PartAssembly",
    "Workers",
    "embedded_parts",
    "whole_parts",
]

_POLL_S = 0.1
_DONE_AHEAD = 256
"""Batches of vectors that may wait to be written."""

_RESERVED_ROWS = 1 << 15
"""Rows for whose vectors a part reserves room at first."""

OPEN_PARTS = 3
"""Parts that may be unfinished at once: the reader waits, so that other workers find parts to claim."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Thread counts of the pipeline stages, and the capacity of the queue of prepared slices."""

    preparers: int
    towers: int
    prepared_ahead: int


@dataclass(frozen=True, slots=True)
class EmbeddedPart:
    """Finished part: its good rows in source order, and its bad rows.

    Attributes:
        number: Part number; its first row is ``number × rows per part``.
        ids: One per good row; row numbers if the source has no ids.
        vectors: float32 (good rows, dim), L2-normalised.
        faults: Rows whose files storage did not deliver; with any, the part is not finished.
        content: Hash of what was read for the part, in hexadecimal.
        pictures: Image files behind a path column, as they were read.
    """

    number: int
    ids: list[Any]
    vectors: NDArray[np.float32]
    bad: list[BadRow]
    counts: Counts
    faults: list[BadRow] = field(default_factory=list)
    content: str = ""
    pictures: tuple[Picture, ...] = ()


class PartAssembly:
    """Assembles one part from slices and vectors that arrive in any order.

    Args:
        n_rows: Rows that the part may have at most.
    """

    def __init__(self, number: int, start: int, dim: int, n_rows: int) -> None:
        self.number, self._start, self._dim = number, start, dim
        self._slices: dict[int, PreparedSlice] = {}
        self._most_rows = n_rows
        self._vectors = _mapped_rows(0, dim)
        self._n_batches = 0
        self._n_rows_seen = 0
        self._n_rows: int | None = None
        self._counts = Counts()

    def add_slice(self, prepared: PreparedSlice, n_batches: int | None = None) -> None:
        """Add a slice; its batches are not held, since their pixels and texts are large.

        Args:
            n_batches: Batches that follow; default: those of the slice.
        """
        self._slices[prepared.start] = replace(prepared, batches=())
        self._n_batches += len(prepared.batches) if n_batches is None else n_batches
        self._n_rows_seen += len(prepared.ids)
        self._counts += prepared.counts

    def add_vectors(self, rows: NDArray[np.int64], counts: Counts, vectors: NDArray[np.float32]) -> None:
        """Add the vectors of one batch."""
        positions = rows - self._start
        self._reserve(int(positions.max()) + 1)
        self._vectors[positions] = vectors
        self._n_batches -= 1
        self._counts += counts

    def end_at(self, stop: int) -> None:
        """Set the end of the part, one past its last row."""
        self._n_rows = stop - self._start

    @property
    def is_complete(self) -> bool:
        """True if every row is embedded or bad."""
        return self._n_rows_seen == self._n_rows and self._n_batches == 0

    def finished(self, *, has_ids: bool) -> EmbeddedPart:
        """Return the finished part, in source order."""
        slices = [self._slices[start] for start in sorted(self._slices)]
        empty = np.empty(0, dtype=np.int64)
        vector_row = np.concatenate([empty, *(prepared.vector_row for prepared in slices)])
        problems = {row: problem for prepared in slices for row, problem in prepared.problems.items()}
        n_before = len(problems)
        for position in np.flatnonzero(np.isin(vector_row, list(problems))):
            row = self._start + int(position)  # a duplicate of a row found to be bad
            problems[row] = problems[int(vector_row[position])]
            vector_row[position] = BAD
        stop = self._start + len(vector_row)
        ids = [i for p in slices for i in p.ids] if has_ids else list(range(self._start, stop))
        good = np.flatnonzero(vector_row != BAD)
        source = vector_row[good] - self._start
        self._reserve(0 if not len(source) else int(source.max()) + 1)
        is_all = bool((source == np.arange(len(source))).all())
        n_late = len(problems) - n_before
        wrong = [(_bad_row(ids[r - self._start], r, problems[r]), problems[r]) for r in sorted(problems)]
        return EmbeddedPart(
            self.number,
            [ids[i] for i in good],
            self._vectors[: len(source)] if is_all else self._rows(source),
            [row for row, problem in wrong if not problem.may_pass],
            self._counts + Counts(bad=n_late, duplicates=-n_late),
            [row for row, problem in wrong if problem.may_pass],
            digest_of_part([prepared.content for prepared in slices]),
            tuple(picture for prepared in slices for picture in prepared.pictures),
        )

    def _rows(self, source: NDArray[np.int64]) -> NDArray[np.float32]:
        chosen = _mapped_rows(len(source), self._dim)
        np.take(self._vectors, source, axis=0, out=chosen)
        return chosen

    def _reserve(self, n_rows: int) -> None:
        if len(self._vectors) < n_rows:
            usual = min(self._most_rows, max(2 * len(self._vectors), _RESERVED_ROWS))
            grown = _mapped_rows(max(n_rows, usual), self._dim)
            grown[: len(self._vectors)] = self._vectors
            self._vectors = grown


def _mapped_rows(n_rows: int, dim: int) -> NDArray[np.float32]:
    """Return float32 (n_rows, dim) in a mapping of its own.

    Rows take memory once they are written, and give it back with the array: arrays of this size among
    small ones leave holes in the heap, which the allocator keeps.
    """
    if not n_rows * dim:
        return np.empty((n_rows, dim), dtype=np.float32)
    mapping = mmap.mmap(-1, 4 * n_rows * dim, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(mapping, dtype=np.float32).reshape(n_rows, dim)


def _bad_row(id_: Any, row: int, problem: Problem) -> BadRow:
    return BadRow(id_, row, problem.kind, problem.reason)


def whole_parts(parts: Iterable[EmbeddedPart]) -> Iterator[EmbeddedPart]:
    """Yield the parts whose files storage delivered.

    Raises:
        InputFaultError: after the last one, if others were left undone; the message names some of their
        files.
    """
    undone: dict[int, list[BadRow]] = {}
    for part in parts:
        if part.faults:
            undone[part.number] = part.faults
        else:
            yield part
    if undone:
        rows = [row for faults in undone.values() for row in faults]
        raise InputFaultError(
            f"{len(undone)} parts are left undone, since {len(rows)} of their files could not be read, among "
            f"them: {rows[0].reason} The other parts are finished; run the same command again to complete "
            "them, or with --skip-bad-files to call these rows bad."
        )


class _StoppedError(Exception):
    """Signals that another thread failed or the caller stopped iterating."""


@dataclass(frozen=True, slots=True)
class _SliceBegin:
    """Slice without its batches, and how many follow."""

    prepared: PreparedSlice
    n_batches: int


@dataclass(frozen=True, slots=True)
class _Vectors:
    part: int
    rows: NDArray[np.int64]
    counts: Counts
    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _PartBegin:
    part: int


@dataclass(frozen=True, slots=True)
class _PartEnd:
    part: int
    stop: int


_Event: TypeAlias = "_SliceBegin | _Vectors | _PartBegin | _PartEnd | BaseException | None"

Observer: TypeAlias = "Callable[[int, Counts], None]"
"""Callback called per batch with the number of finished rows and their counts."""


class _Channel:
    """Bounded queue whose blocked callers are released when the run stops."""

    def __init__(self, size: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(size)
        self._stop = stop

    def put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        raise _StoppedError

    def get(self) -> Any:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        raise _StoppedError


@dataclass(slots=True)
class _Feed:
    """Feed of single batches, slice by slice, pulled by the towers."""

    prepared: _Channel
    done: _Channel
    lock: threading.Lock = field(default_factory=threading.Lock)
    part: int = -1
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    ended: bool = False

    def next(self) -> tuple[int, Batch] | None:
        with self.lock:
            while not self.ended:
                batch = next(self.batches, None)
                if batch is not None:
                    return self.part, batch
                prepared = self.prepared.get()
                if prepared is None:
                    self.ended = True
                    break
                self.done.put(_SliceBegin(replace(prepared, batches=()), len(prepared.batches)))
                self.part, self.batches = prepared.part, iter(prepared.batches)
            return None


def embedded_parts(
    encoder: Encoder,
    preparation: Preparation,
    slices: Iterator[tuple[int, Rows]],
    *,
    dim: int,
    rows_per_part: int,
    has_ids: bool,
    workers: Workers,
    observe: Observer | None = None,
    on_stop: Callable[[], None] = lambda: None,
    most_open: int = OPEN_PARTS,
) -> Iterator[EmbeddedPart]:
    """Embed slices and yield whole parts, in order.

    Args:
        slices: Part number and rows, in order; see ``slices_from_rows``.
        dim: Width of the vectors.
        has_ids: True if the rows have ids; otherwise row numbers are used.
        most_open: Parts that may be unfinished at once; more if parts are smaller than what is in flight.
        on_stop: Called before the threads are joined; it must end what they may be waiting for.

    Raises:
        BabeltowerError: reading the source failed, after the whole parts before it were yielded; or running
            the tower failed.
    """
    stop = threading.Event()
    raw, prepared, done = (_Channel(n, stop) for n in (2, workers.prepared_ahead, _DONE_AHEAD))
    open_parts = _Channel(most_open, stop)
    alive = threading.Semaphore(workers.preparers - 1)

    unread: list[Exception] = []

    def read() -> None:
        last: Slice | None = None
        try:
            for piece in preparation.deduplicated(slices):
                if last is None or last.part != piece.part:
                    if last is not None:
                        done.put(_PartEnd(last.part, last.rows.stop))
                    open_parts.put(piece.part)
                    done.put(_PartBegin(piece.part))  # before any of its slices: parts begin in order
                raw.put(piece)
                last = piece
        except _StoppedError:
            raise
        except Exception as error:  # raised once the parts before it are done; the part under way is left
            if last is not None and last.rows.stop == (last.part + 1) * rows_per_part:
                done.put(_PartEnd(last.part, last.rows.stop))
            unread.append(error)
        else:
            if last is not None:
                done.put(_PartEnd(last.part, last.rows.stop))
        raw.put(None)

    def prepare() -> None:
        while (piece := raw.get()) is not None:
            prepared.put(preparation.prepared(piece))
        raw.put(None)
        if not alive.acquire(blocking=False):  # the last preparer ends the feed
            prepared.put(None)

    feed = _Feed(prepared, done)

    def embed() -> None:
        while (found := feed.next()) is not None:
            part, batch = found
            done.put(_Vectors(part, batch.rows, batch.counts, batch.run(encoder, dim)))
        done.put(None)

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                with contextlib.suppress(_StoppedError):
                    work()
            except BaseException as error:  # handed to the caller's thread, which raises it
                with contextlib.suppress(_StoppedError):
                    done.put(error)

        return run

    jobs = [read, *[prepare] * workers.preparers, *[embed] * workers.towers]
    threads = [threading.Thread(target=guarded(job), daemon=True, name="babeltower-corpus") for job in jobs]
    for thread in threads:
        thread.start()
    try:
        assemblies = _Assemblies(dim, rows_per_part, has_ids, observe or (lambda n_rows, counts: None))
        for part in assemblies.finished(done, n_towers=workers.towers):
            open_parts.get()
            yield part
        if unread:
            raise unread[0]
    finally:
        stop.set()
        on_stop()
        for thread in threads:
            thread.join()


@dataclass(slots=True)
class _Assemblies:
    """Unfinished parts, in the order in which they began."""

    dim: int
    rows_per_part: int
    has_ids: bool
    observe: Observer
    open_parts: dict[int, PartAssembly] = field(default_factory=dict)

    def finished(self, done: _Channel, *, n_towers: int) -> Iterator[EmbeddedPart]:
        while n_towers:
            event: _Event = done.get()
            if event is None:
                n_towers -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                self._take(event)
            while self.open_parts and self.open_parts[first := next(iter(self.open_parts))].is_complete:
                yield self.open_parts.pop(first).finished(has_ids=self.has_ids)

    def _take(self, event: _SliceBegin | _Vectors | _PartBegin | _PartEnd) -> None:
        match event:
            case _PartBegin(number):
                self.open_parts[number] = PartAssembly(
                    number, number * self.rows_per_part, self.dim, self.rows_per_part
                )
            case _SliceBegin(prepared, n_batches):
                self.open_parts[prepared.part].add_slice(prepared, n_batches)
                self.observe(prepared.counts.bad + prepared.counts.duplicates, prepared.counts)
            case _Vectors(part, rows, counts, vectors):
                self.open_parts[part].add_vectors(rows, counts, vectors)
                self.observe(len(rows), counts)
            case _PartEnd(part, stop):
                self.open_parts[part].end_at(stop)
