"""Update of an index: new files of vectors are added, the rows of others removed, segments merged.

An update writes new files beside the old ones, and makes them the index by replacing ``index.json``: a killed
update leaves the index as it was. Rows are added as a segment of their own and removed by their numbers, so
that an update costs what it changes and not what is there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.extras import import_optional, pyarrow
from runtime.indexes import faiss_index
from runtime.indexes.build import Progress, parts_of_shards
from runtime.indexes.conditions import PART_COLUMN
from runtime.indexes.folder import IdsFile, rows_from_file, written_to
from runtime.indexes.plan import Kind, Plan
from runtime.indexes.record import (
    IDS_FILE,
    INDEX_FILE,
    TRAINED_FILE,
    VERSION,
    IndexRecord,
    Segment,
)
from runtime.indexes.shards import VectorShards
from runtime.indexes.vector_index import allowed_rows
from runtime.machine import n_cores
from runtime.storage import replace_durably, sha256_of_file, staged_folder

__all__ = ["IndexChange", "merge_segments", "update_index"]

_MERGED_ROWS = 65_536
_UNCHANGED = "The index is as it was; free space."
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_GENERATION = re.compile(r"\D*-(\d+)(?:-\d+)?\.\w+")


@dataclass(frozen=True, slots=True)
class IndexChange:
    """Effect of an update.

    Attributes:
        added: Rows of new or changed files.
        removed: Rows of files that are gone or changed, and of ids that were to be removed.
        unknown_ids: Ids to remove that the index does not hold, sorted.
    """

    record: IndexRecord
    added: int
    removed: int
    unknown_ids: tuple[str, ...]
    seconds: float


def update_index(
    index: str | os.PathLike[str],
    vectors: str | os.PathLike[str] | None = None,
    *,
    remove: frozenset[str] = frozenset(),
    threads: int | None = None,
    progress: Progress = lambda _step, _done, _of: None,
) -> IndexChange:
    """Add the new files of a folder of vectors to its index, and remove rows.

    Args:
        index: Folder of the index.
        vectors: Folder that the index was built from: rows of its new and changed files are added, rows of
            files that are gone or were changed are removed. ``None`` leaves the files as they are.
        remove: Ids whose rows are removed; an integer in its usual form, so that ``02`` is not 2.

    Raises:
        InputError: the index is of version 1, or the vectors are of another space; nothing is changed.
        DamagedVectorsError: a file of the vectors or of the index is damaged.
    """
    started = time.perf_counter()
    folder = Path(index)
    record = IndexRecord.read(folder)
    if record.version != VERSION:
        raise InputError(
            f"{folder} is an index of version {record.version}, which does not say what rows it holds. Build "
            "it again, with --replace."
        )
    faiss_index.use_threads(threads or n_cores())
    new, gone = _changed_parts(record, vectors)
    with written_to(folder, _UNCHANGED):
        generation = 1 + max(map(_generation, record.file_bytes), default=0)
        files: dict[str, Path] = {}
        segments = list(record.segments)
        removed, found_ids = 0, set[str]()
        for number, segment in enumerate(segments):
            kept = _removal(folder, segment, gone, remove, f"removed-{generation:04d}-{number:04d}.npy")
            segments[number] = kept.segment
            removed, found_ids = removed + kept.n_newly_removed, found_ids | kept.found_ids
            files |= kept.files
        added = 0
        if new is not None:
            first = 1 + max((part.number for part in record.parts), default=-1)
            segment = _new_segment(folder, record, new, generation, first, progress)
            segments.append(segment)
            files |= {name: folder / name for name in (segment.index, segment.ids)}
            added = segment.n_rows
        changed = _with_files(record, folder, segments, files)
        parts = [part for part in record.parts if part.number not in gone]
        if new is not None:
            parts += parts_of_shards(new, first=first)
        changed = replace(changed, parts=tuple(parts))
        changed.write(folder)
        _remove_unnamed(folder, changed)
    unknown = tuple(sorted(remove - found_ids))
    return IndexChange(changed, added, removed, unknown, time.perf_counter() - started)


def _changed_parts(
    record: IndexRecord, vectors: str | os.PathLike[str] | None
) -> tuple[VectorShards | None, frozenset[int]]:
    """Return the shards to add, and the numbers of the parts whose rows go."""
    if vectors is None:
        return None, frozenset()
    shards = VectorShards.open(vectors, known={part.sha256 for part in record.parts})
    if shards.space != record.space:
        raise InputError(
            f"{os.fspath(vectors)} is of another space than the index: it has {shards.space}, the index "
            f"{record.space}. Update an index with vectors of the same model, width and encoding."
        )
    held = {(part.file, part.sha256) for part in record.parts}
    sums = {shard.path.name: shard.sha256 or sha256_of_file(shard.path) for shard in shards.shards}
    new = tuple(shard for shard in shards.shards if (shard.path.name, sums[shard.path.name]) not in held)
    gone = frozenset(part.number for part in record.parts if sums.get(part.file) != part.sha256)
    return (replace(shards, shards=new) if new else None), gone


@dataclass(frozen=True, slots=True)
class _Removal:
    segment: Segment
    n_newly_removed: int
    found_ids: frozenset[str]
    files: Mapping[str, Path]


def _removal(
    folder: Path, segment: Segment, gone: frozenset[int], remove: frozenset[str], name: str
) -> _Removal:
    """Find the rows of a segment that go, and write all its removed rows to a new file."""
    allowed = allowed_rows(folder, segment)
    before = np.ones(segment.n_rows, dtype=np.bool_) if allowed is None else allowed
    going = np.zeros(segment.n_rows, dtype=np.bool_)
    found = frozenset[str]()
    if gone or remove:
        rows = rows_from_file(folder / segment.ids)
        if gone:
            going |= np.isin(rows[PART_COLUMN].to_numpy(), sorted(gone))
        if remove:
            among = _among(rows["id"], remove) & before
            found = frozenset(map(str, rows["id"].filter(pyarrow().array(among)).to_pylist()))
            going |= among
    going &= before
    if not going.any():
        return _Removal(
            segment, 0, found, {segment.removed: folder / segment.removed} if segment.removed else {}
        )
    removed = np.flatnonzero(~before | going)
    replace_durably(folder / name, lambda path: _save(path, removed))
    changed = replace(segment, removed=name, n_removed=len(removed))
    return _Removal(changed, int(going.sum()), found, {name: folder / name})


def _among(ids: Any, remove: frozenset[str]) -> NDArray[np.bool_]:
    compute = import_optional("pyarrow.compute", "An update", "babeltower[index]")
    arrow = pyarrow()
    wanted: list[Any] = sorted(remove)
    if ids.type == arrow.int64():
        numbers = {one: int(one) for one in wanted if _INTEGER.fullmatch(one)}
        wanted = [number for number in numbers.values() if -(1 << 63) <= number < 1 << 63]
    found: NDArray[np.bool_] = compute.is_in(ids, value_set=arrow.array(wanted, ids.type)).to_numpy()
    return found


def _new_segment(
    folder: Path, record: IndexRecord, shards: VectorShards, generation: int, first: int, progress: Progress
) -> Segment:
    """Write the rows of shards as a segment of their own."""
    index = _empty_index(folder, record)
    segment = Segment(f"index-{generation:04d}.faiss", f"ids-{generation:04d}.arrow", len(shards))
    schema = shards.shards[0].schema
    known = rows_from_file(folder / record.segments[0].ids).schema
    if [field for field in known if field.name != PART_COLUMN] != list(schema):
        raise InputError(
            f"{shards.location} has the columns {schema.names}, the index {known.names[:-1]}. Keep the same "
            "columns, or build the index again, with --replace."
        )

    def write_rows(path: Path) -> None:
        done = 0
        with IdsFile.create(path, schema) as rows:
            for number, shard in enumerate(shards.shards, first):
                for block in shard.blocks():
                    faiss_index.add(index, record.space, block.vectors)
                    rows.write(block.rows, np.full(len(block.vectors), number, dtype=np.int32))
                    done += len(block.vectors)
                    progress("adding", done, len(shards))

    replace_durably(folder / segment.ids, write_rows)
    replace_durably(folder / segment.index, lambda path: faiss_index.save(index, path))
    return segment


def _empty_index(folder: Path, record: IndexRecord) -> Any:
    if (folder / TRAINED_FILE).is_file():
        return faiss_index.index_from_file(folder / TRAINED_FILE, record.space, in_memory=True)
    return faiss_index.index_from_plan(
        Plan(Kind(record.kind), record.space, record.parameters, 0, record.seed)
    )


def merge_segments(
    index: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress = lambda _step, _done, _of: None,
) -> IndexRecord:
    """Write the rows of all segments that were not removed as one segment; the vectors are not needed.

    An ``ivf-pq`` index keeps its lists and codes, and its rows are coded anew from the copies that refine
    them; the others hold their rows as they were stored.

    Raises:
        DamagedVectorsError: a file of the index is damaged.
    """
    folder = Path(index)
    record = IndexRecord.read(folder)
    record.require_unchanged(folder)
    faiss_index.use_threads(threads or n_cores())
    with written_to(folder, _UNCHANGED), staged_folder(folder) as staged:
        merged = _empty_index(folder, record)
        tables = [rows_from_file(folder / segment.ids) for segment in record.segments]
        schema = pyarrow().schema([field for field in tables[0].schema if field.name != PART_COLUMN])
        with IdsFile.create(staged / IDS_FILE, schema) as rows:
            for segment, table in zip(record.segments, tables, strict=True):
                _copy_segment(folder, record, segment, table, merged, rows, progress)
        faiss_index.save(merged, staged / INDEX_FILE)
        if (folder / TRAINED_FILE).is_file():
            (staged / TRAINED_FILE).write_bytes((folder / TRAINED_FILE).read_bytes())
        segments = [Segment(INDEX_FILE, IDS_FILE, merged.ntotal)]
        files = {path.name: path for path in staged.iterdir()}
        changed = _with_files(replace(record, file_bytes={}, file_sha256={}), staged, segments, files)
        changed.write(staged)
    return changed


def _copy_segment(
    folder: Path,
    record: IndexRecord,
    segment: Segment,
    table: Any,
    merged: Any,
    rows: IdsFile,
    progress: Progress,
) -> None:
    index = faiss_index.index_from_file(folder / segment.index, record.space, in_memory=True)
    allowed = allowed_rows(folder, segment)
    for start in range(0, segment.n_rows, _MERGED_ROWS):
        stop = min(start + _MERGED_ROWS, segment.n_rows)
        kept = np.ones(stop - start, dtype=np.bool_) if allowed is None else allowed[start:stop]
        vectors = faiss_index.rows_of_index(index, record.space, start, stop - start)[kept]
        merged.add(np.ascontiguousarray(vectors))
        for batch in table.slice(start, stop - start).filter(pyarrow().array(kept)).to_batches():
            columns = [batch.column(name) for name in batch.schema.names if name != PART_COLUMN]
            schema = [field for field in batch.schema if field.name != PART_COLUMN]
            plain = pyarrow().record_batch(columns, schema=pyarrow().schema(schema))
            rows.write(plain, batch.column(PART_COLUMN).to_numpy())
        progress("merging", stop, segment.n_rows)


def _with_files(
    record: IndexRecord, folder: Path, segments: list[Segment], files: Mapping[str, Path]
) -> IndexRecord:
    """Return the record with other segments, and the sizes and checksums of the files they name."""
    named = {TRAINED_FILE, *(name for one in segments for name in (one.index, one.ids, one.removed) if name)}
    sizes = {name: size for name, size in record.file_bytes.items() if name in named}
    sums = {name: sha256 for name, sha256 in record.file_sha256.items() if name in named}
    for name, path in files.items():
        sizes[name], sums[name] = path.stat().st_size, sha256_of_file(path)
    n_rows = sum(segment.n_rows - segment.n_removed for segment in segments)
    return replace(record, segments=tuple(segments), n_rows=n_rows, file_bytes=sizes, file_sha256=sums)


def _remove_unnamed(folder: Path, record: IndexRecord) -> None:
    """Remove files of earlier states of the index, and of killed updates."""
    for path in folder.iterdir():
        if _GENERATION.fullmatch(path.name) and path.name not in record.file_bytes:
            path.unlink(missing_ok=True)


def _generation(name: str) -> int:
    match = _GENERATION.fullmatch(name)
    return int(match[1]) if match else 0


def _save(path: Path, numbers: NDArray[np.int64]) -> None:
    with path.open("wb") as file:
        np.save(file, numbers)
