"""Finished output of a run: the files that belong to a folder of vectors, checked against its journal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.corpus.journal import (
    PartRecord,
    files_of_part,
    is_former_journal,
    part_name,
    sizes_of_files,
    state_of_store,
)
from runtime.corpus.stores import Store, store_from_location
from runtime.errors import DamagedVectorsError, UnfinishedRunError
from runtime.logs import LOGGER

__all__ = ["RecordedFile", "files_of_finished_run", "problems_of_files", "recorded_files", "require_finished"]

_VECTORS = re.compile(r"part-\d{5,}\.parquet")
_FORMER_RECORD = "run{}.json"


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """Name of a file of vectors, with its recorded size in bytes and SHA-256, if they are recorded."""

    name: str
    n_bytes: int | None
    sha256: str | None


def files_of_finished_run(folder: Path) -> list[RecordedFile]:
    """Return the files of vectors of a folder, in the order of their rows.

    Raises:
        UnfinishedRunError: the run is not finished.
        DamagedVectorsError: a file is missing, has another size than recorded, or belongs to no part.
        CorpusError: the journal cannot be read.
    """
    store = store_from_location(folder)
    former = sorted(name for name in store.names() if is_former_journal(name))
    if former:
        records = _records_of_former(store, former)
    elif store.names("_journal"):
        state = state_of_store(store)
        require_finished(store.location, state.n_parts(), state.done, state.lost)
        records = {**state.done, **state.lost}
    else:
        LOGGER.warning("%s has no journal, so that a missing part would not be noticed", folder)
        found = sorted(filter(_VECTORS.fullmatch, store.names()), key=_order)
        return [RecordedFile(name, None, None) for name in found]
    _require_whole(store, records, strict=not former or bool(records))
    names = [files_of_part(part)[0] for part in sorted(records)]
    if former and not records:
        names = sorted(filter(_VECTORS.fullmatch, store.names()), key=_order)
    sizes = {name: size for record in records.values() for name, size in record.files.items()}
    sums = {name: sha256 for record in records.values() for name, sha256 in record.sha256.items()}
    return [
        RecordedFile(name, sizes.get(name), sums.get(name)) for name in names if name in sizes or not records
    ]


def recorded_files(folder: Path) -> list[RecordedFile]:
    """Return the files of vectors that the journal records so far, finished run or not."""
    state = state_of_store(store_from_location(folder))
    return [
        RecordedFile(name, record.files[name], record.sha256.get(name))
        for part, record in sorted({**state.done, **state.lost}.items())
        if (name := files_of_part(part)[0]) in record.files
    ]


def require_finished(
    location: str, n_parts: int | None, done: Mapping[int, PartRecord], lost: Mapping[int, PartRecord]
) -> None:
    """Check that every part of a run was recorded.

    Raises:
        UnfinishedRunError: a part was not.
    """
    missing = [] if n_parts is None else [part for part in range(n_parts) if part not in {**done, **lost}]
    if n_parts is None or missing:
        what = (
            "its end was not reached" if n_parts is None else f"{len(missing)} of {n_parts} parts are missing"
        )
        first = f", the first is {part_name(missing[0])}" if missing else ""
        raise UnfinishedRunError(
            f"The embedding run of {location} is not finished: {what}{first}. Run the same babeltower embed "
            "command again to resume it."
        )


def problems_of_files(store: Store, records: Mapping[int, PartRecord]) -> list[str]:
    """Describe each file that is missing, of another size than recorded, or of no recorded part."""
    found = sizes_of_files(store)
    recorded = {name: size for record in records.values() for name, size in record.files.items()}
    problems = []
    for name, size in sorted(recorded.items()):
        if name not in found:
            problems.append(f"{store.path(name)} is missing")
        elif found[name] != size:
            problems.append(f"{store.path(name)} has {found[name]:,} bytes; {size:,} were written")
    strays = sorted(found.keys() - recorded.keys())
    return problems + [f"{store.path(name)} belongs to no finished part of the journal" for name in strays]


def _require_whole(store: Store, records: Mapping[int, PartRecord], *, strict: bool) -> None:
    problems = problems_of_files(store, records) if strict else []
    if problems:
        more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise DamagedVectorsError(
            f"{problems[0]}{more}. Run the same babeltower embed command again, which writes lost parts "
            "anew; move files away that are not its own."
        )


def _records_of_former(store: Store, journals: list[str]) -> dict[int, PartRecord]:
    """Return the records of a run's journals of version 1 or 2; none if they record no parts."""
    records: dict[int, PartRecord] = {}
    names = store.names()
    for journal in journals:
        suffix = journal.removeprefix("journal").removesuffix(".jsonl")
        for of in _shards_of_former(suffix):
            if _FORMER_RECORD.format(of) not in names:
                raise UnfinishedRunError(
                    f"The embedding run of {store.location} is not finished: it has {journal} but no "
                    f"{_FORMER_RECORD.format(of)}. Run the same babeltower embed command again to resume it, "
                    "with the babeltower that began it."
                )
        for line in (store.read(journal) or b"").splitlines():
            record = _decoded(line)
            if record is None:
                break
            if "part" in record:
                records[record["part"]] = PartRecord(
                    record["part"], record["rows"], record["files"], {}, {}, {}
                )
    return records


def _shards_of_former(suffix: str) -> list[str]:
    if not suffix:
        return [""]
    count = suffix.rpartition("-")[2]
    return [f"-{index}-of-{count}" for index in range(int(count))]


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _order(name: str) -> tuple[int, str]:
    return len(name), name
