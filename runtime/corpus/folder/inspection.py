"""Looking at a folder of vectors from outside: how far its run is, and whether its files are intact."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.corpus.folder.finished import problems_of_files
from runtime.corpus.folder.leases import said_by_worker, worker_file
from runtime.corpus.journal import (
    JournalState,
    PartRecord,
    files_of_part,
    state_of_store,
    workers_of_store,
)
from runtime.corpus.stores import Store
from runtime.cosines import row_lengths
from runtime.extras import parquet, pyarrow
from runtime.machine import n_cores

__all__ = ["FolderCheck", "RunStatus", "WorkerStatus", "check_of_folder", "status_of_folder"]

_HASHED_BYTES = 1 << 22
_LENGTH_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker that has a file in the journal.

    Attributes:
        parts: Unfinished parts that it holds.
        beat: Number of its latest sign of life.
    """

    name: str
    host: str
    process: int
    parts: tuple[int, ...]
    beat: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Progress of a run as its journal says it.

    Attributes:
        is_finished: True if every part of the source is recorded and there.
        n_parts: Parts of the whole source; ``None`` until it was read to its end.
        parts_done: Finished parts; ``parts_lost`` of further ones the files are gone, ``parts_held`` are
            under way.
        rows: Rows of the finished parts, of which ``bad`` have no vector; ``bad_kinds`` by their class.
        rows_per_second: Rows of the parts that were finished in the last minutes of work by the time that
            they took, of all workers together; ``None`` for fewer than two parts.
        seconds_left: Estimate at that rate; ``None`` if the source's rows are not known.
        n_bytes: Size of all files of parts.
    """

    location: str
    is_finished: bool
    model: str
    engine: str
    modality: str
    n_parts: int | None
    parts_done: int
    parts_lost: int
    parts_held: int
    rows: int
    bad: int
    bad_kinds: Mapping[str, int]
    rows_per_second: float | None
    seconds_left: float | None
    n_bytes: int
    computations: int
    workers: tuple[WorkerStatus, ...]


def status_of_folder(store: Store) -> RunStatus:
    """Read the progress of a run from its folder; nothing is written.

    Raises:
        CorpusError: the folder holds no journal of this version, or cannot be read.
    """
    state = state_of_store(store)
    arguments = state.arguments or {}
    done = [state.done[part] for part in sorted(state.done)]
    kinds: Counter[str] = Counter()
    for record in done:
        kinds.update(record.bad_kinds)
    n_parts, rows = state.n_parts(), sum(record.rows for record in done)
    rate = _rate(done)
    left = None if state.n_rows is None or not rate else max(0, state.n_rows - rows) / rate
    return RunStatus(
        location=store.location,
        is_finished=n_parts is not None and len(done) == n_parts,
        model=str(arguments.get("model")),
        engine=f"{arguments.get('engine')} {arguments.get('precision')}",
        modality=str(arguments.get("modality")),
        n_parts=n_parts,
        parts_done=len(done),
        parts_lost=len(state.lost),
        parts_held=len(state.held),
        rows=rows,
        bad=sum(record.counts.get("bad", 0) for record in done),
        bad_kinds=dict(kinds.most_common()),
        rows_per_second=rate,
        seconds_left=left,
        n_bytes=sum(size for record in done for size in record.files.values()),
        computations=len(state.computations),
        workers=tuple(_workers(store, state)),
    )


_RECENT_PARTS = 64


def _rate(done: list[PartRecord]) -> float | None:
    recent = sorted((record for record in done if record.finished), key=lambda record: record.finished)
    recent = recent[-_RECENT_PARTS:]
    if len(recent) < 2 or recent[-1].finished <= recent[0].finished:
        return None
    return sum(record.rows for record in recent[1:]) / (recent[-1].finished - recent[0].finished)


def _workers(store: Store, state: JournalState) -> Iterator[WorkerStatus]:
    for name in workers_of_store(store):
        said = said_by_worker(store.read(worker_file(name)) or b"")
        held = tuple(sorted(part for part, holder in state.held.items() if holder == name))
        yield WorkerStatus(
            name, str(said.get("host", "")), int(said.get("process", 0)), held, int(said.get("beat", 0))
        )


@dataclass(frozen=True, slots=True)
class FolderCheck:
    """Result of reading every byte of a folder of vectors.

    Attributes:
        is_finished: True if every part of the source is recorded.
        files: Files that were read; ``n_bytes`` and ``rows`` of them.
        problems: One sentence for each problem, with the file's name.
    """

    location: str
    is_finished: bool
    files: int
    rows: int
    n_bytes: int
    seconds: float
    problems: tuple[str, ...]


def check_of_folder(
    store: Store, progress: Callable[[int, int], None] = lambda done, of: None
) -> FolderCheck:
    """Read every file of a folder and compare it with the journal.

    Checked are names, sizes, SHA-256, the checksum of each Parquet page, row counts, ids, and that every
    vector is finite and, if it is stored as floats, of unit length.

    Args:
        progress: Called with the files that were read and their number.

    Raises:
        CorpusError: the folder holds no journal of this version, or cannot be read.
    """
    started = time.perf_counter()
    state = state_of_store(store)
    records = {**state.done, **state.lost}
    problems = problems_of_files(store, records)
    parts = [records[part] for part in sorted(records)]
    arguments = state.arguments or {}
    with ThreadPoolExecutor(n_cores()) as pool:
        found: list[list[str]] = []
        for number, one in enumerate(pool.map(lambda part: _problems_of_part(store, part, arguments), parts)):
            found.append(one)
            progress(number + 1, len(parts))
    n_parts = state.n_parts()
    return FolderCheck(
        location=store.location,
        is_finished=n_parts is not None and not set(range(n_parts)) - records.keys(),
        files=sum(len(record.files) for record in parts),
        rows=sum(record.rows for record in parts),
        n_bytes=sum(size for record in parts for size in record.files.values()),
        seconds=time.perf_counter() - started,
        problems=(*problems, *(problem for one in found for problem in one)),
    )


def _problems_of_part(store: Store, record: PartRecord, arguments: Mapping[str, Any]) -> list[str]:
    vectors, bad_rows, _ = files_of_part(record.part)
    n_bad = record.counts.get("bad", 0)
    expected = {vectors: record.rows - n_bad, bad_rows: n_bad}
    filesystem, root = store.arrow()
    problems = []
    for name in record.files:
        path = f"{root}/{name}"
        try:
            if (found := _sha256(filesystem, path)) != record.sha256.get(name, found):
                problems.append(
                    f"{store.path(name)} was changed: its SHA-256 is {found[:12]}…, "
                    f"{record.sha256[name][:12]}… was written"
                )
            if name in expected:
                problems += _problems_of_table(filesystem, path, store.path(name), expected[name], arguments)
        except FileNotFoundError:
            continue  # reported as missing
        except (pyarrow().ArrowException, OSError) as error:
            problems.append(f"{store.path(name)} cannot be read: {error}")
    return problems


def _sha256(filesystem: Any, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _problems_of_table(
    filesystem: Any, path: str, shown: str, n_rows: int, arguments: Mapping[str, Any]
) -> Iterator[str]:
    with (
        filesystem.open_input_file(path) as opened,
        parquet().ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        if file.metadata.num_rows != n_rows:
            yield f"{shown} has {file.metadata.num_rows:,} rows; {n_rows:,} were written"
        said = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        if said.get("babeltower.fingerprint") != arguments.get("fingerprint"):
            yield f"{shown} is of another model than the run: {said.get('babeltower.fingerprint')}"
        for batch in file.iter_batches():
            yield from _problems_of_batch(batch, shown)


def _problems_of_batch(batch: Any, shown: str) -> Iterator[str]:
    if "vector" not in batch.schema.names:
        return
    if batch.column("id").null_count or batch.column("vector").null_count:
        yield f"{shown} has a row without an id or a vector"
        return
    column = batch.column("vector")
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    if vectors.dtype.kind == "f":
        lengths = row_lengths(vectors)
        if not np.isfinite(lengths).all():
            yield f"{shown} has a vector that is not finite"
        elif len(lengths) and np.abs(lengths - 1).max() > _LENGTH_TOLERANCE:
            yield f"{shown} has a vector of length {lengths[np.abs(lengths - 1).argmax()]:.3f}; expected 1"
