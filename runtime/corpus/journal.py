"""Journal of a run: what it embeds, who embeds which part, and which parts are finished.

The journal is a folder of small files, ``_journal/LOG.NUMBER.json``, each created once and never changed. The
log ``run`` holds the arguments that determine the output, the computations and the end of the source; every
part has a log of its own, of claims and at last its record. An entry takes the number after the last one, and
of several workers that create the same number exactly one succeeds. Hence any number of workers share a
folder, on a disk, a network file system or an object store, without locks:

- A worker embeds a part only after its claim is in the part's log. A claim lasts as long as its worker lives
  (``runtime/corpus/folder/leases.py``); then another worker may add its own.
- A part is finished by an entry right after the worker's own claim. A worker that was taken for dead finds
  that number taken, and what it computed is dropped.

A part's record is written only after its files are complete, so after any interruption a part is either
finished or embedded again.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from runtime.corpus.computation import Computation, ComputationChange, require_acceptable
from runtime.corpus.folder.leases import LEASE_S, Fleet
from runtime.corpus.stores import Store, store_from_location
from runtime.errors import CorpusError, DamagedVectorsError
from runtime.fingerprints import remark_on_vectors
from runtime.logs import LOGGER

__all__ = [
    "BAD_ROWS",
    "VERSION",
    "Journal",
    "JournalState",
    "PartRecord",
    "Shard",
    "SourceChange",
    "computations_of_folder",
    "files_of_part",
    "is_former_journal",
    "part_name",
    "sizes_of_files",
    "state_of_store",
    "workers_of_store",
]

VERSION = 3
"""Version of the journal; 1 and 2 were files of JSON lines, one for each shard."""

BAD_ROWS = "_bad-rows"
"""Folder of the tables of bad rows."""

_DATASET_FILE = ".huggingface.yaml"
_DATASET = b'configs:\n- config_name: default\n  data_files: "part-*.parquet"\n'
"""Tells ``datasets`` which files are the data set: it reads all Parquet files else, bad rows too."""

_FOLDER = "_journal"
_PART_FOLDERS = ("", f"{BAD_ROWS}/", "_npy/")
"""Folders of the files of parts."""

_WRITTEN_TO = (*_PART_FOLDERS, f"{_FOLDER}/", "_input/")
"""Folders of all files of a run."""

_RUN = "run"
_ENTRY = re.compile(r"(run|part-\d{5,})\.(\d+)\.json")
_PART = re.compile(r"part-(\d{5,})\.")
_FORMER = re.compile(r"journal(-\d+-of-\d+)?\.jsonl")
_POLL_S = 0.2


class SourceChange(Enum):
    """Change of a source between two runs of one folder that the later one takes up."""

    NONE = "none"
    GROWN = "grown"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard ``index`` of ``count`` of a run: every ``count``-th part, starting at ``index``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise CorpusError(
                f"Invalid shard {self.index}/{self.count}; expected i/n with 0 <= i < n, e.g. 0/4 to 3/4."
            )

    @property
    def suffix(self) -> str:
        """Suffix of the name of the shard's record."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"

    def has(self, part: int) -> bool:
        """Check whether a part belongs to this shard."""
        return part % self.count == self.index


def part_name(part: int) -> str:
    """Return the stem of a part's file names: ``part-00000``."""
    return f"part-{part:05d}"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """Record of a finished part.

    Attributes:
        part: Number of the part.
        rows: Source rows of the part, good and bad.
        files: Path relative to the output folder → size in bytes.
        counts: Nonzero fields of ``Counts``.
        bad_kinds: Kind of problem → number of rows.
        sha256: Path of each file → SHA-256 of its content.
        finished: Time when the part was finished, in seconds since 1970 by its worker's clock.
        content: Hash of what was read for the part; empty if it was not recorded.
    """

    part: int
    rows: int
    files: Mapping[str, int]
    counts: Mapping[str, int]
    bad_kinds: Mapping[str, int]
    sha256: Mapping[str, str]
    finished: float = 0.0
    content: str = ""


@dataclass(slots=True)
class _Log:
    """Entries of one log that were read: number → entry; an unreadable entry is ``None``."""

    entries: dict[int, Mapping[str, Any] | None]

    @property
    def last(self) -> int:
        """Number of the last entry; 0 if there is none."""
        return max(self.entries, default=0)

    @property
    def latest(self) -> Mapping[str, Any]:
        """Last entry; empty if there is none, or it is unreadable."""
        return self.entries.get(self.last) or {}


class JournalState:
    """What a folder's journal says, read without taking part in the run.

    Attributes:
        arguments: Arguments of the run; ``None`` before they are known.
        n_rows: Rows of the source; ``None`` until it was read to its end.
        done: Part → record of each finished part whose files are there in their recorded sizes.
        lost: Part → record of each finished part whose files are missing or of another size.
        held: Part → name of the worker that holds an unfinished part; it may be dead.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._logs: dict[str, _Log] = {}
        self.arguments: Mapping[str, Any] | None = None
        self.n_rows: int | None = None
        self.done: dict[int, PartRecord] = {}
        self.lost: dict[int, PartRecord] = {}
        self.held: dict[int, str] = {}
        self._computations: dict[int, Computation] = {}
        self._computed_by: dict[int, int] = {}

    def refresh(self) -> None:
        """Read the entries that were added since the last time, and look whether parts' files are there."""
        names = self.store.names(_FOLDER)
        wanted: list[tuple[str, str, int]] = []
        present: dict[str, set[int]] = {}
        for name in names:
            if match := _ENTRY.fullmatch(name):
                log, number = match[1], int(match[2])
                present.setdefault(log, set()).add(number)
        for log, numbers in present.items():
            known = self._log(log).entries
            newest = numbers if log == _RUN else {max(numbers)}
            wanted += [(f"{_FOLDER}/{_entry(log, n)}", log, n) for n in newest if known.get(n) is None]
        contents = self.store.read_all([path for path, _, _ in wanted])
        for path, log, number in wanted:
            if path in contents:
                self._log(log).entries[number] = _entry_from_bytes(contents[path])
        for log in [log for log in self._logs if log not in present]:
            del self._logs[log]
        self._fold()

    def _log(self, name: str) -> _Log:
        return self._logs.setdefault(name, _Log({}))

    def _fold(self) -> None:
        self.arguments, self.n_rows, self._computations = None, None, {}
        for number, entry in sorted(self._log(_RUN).entries.items()):
            if entry is None:
                continue
            if "arguments" in entry:
                _require_version(entry, self.store)
                self.arguments, self.n_rows = entry["arguments"], None
            if "computation" in entry:
                self._computations[number] = entry["computation"]
            if "end" in entry:
                self.n_rows = entry["end"]
        self._fold_parts()

    def _fold_parts(self) -> None:
        sizes = sizes_of_files(self.store)
        self.done, self.lost, self.held, self._computed_by = {}, {}, {}, {}
        for name, log in self._logs.items():
            if name == _RUN:
                continue
            part, entry = int(name.removeprefix("part-")), log.latest
            if "done" in entry:
                record = _record_from_entry(entry["done"])
                is_whole = all(sizes.get(file) == size for file, size in record.files.items())
                (self.done if is_whole else self.lost)[part] = record
                self._computed_by[part] = entry.get("computation", 0)
            elif "claimed" in entry:
                self.held[part] = entry["worker"]

    @property
    def computations(self) -> list[Computation]:
        """Distinct computations of the finished parts, in the order of their first part to be recorded."""
        used = {self._computed_by[part] for part in self.done}
        return [computation for number, computation in sorted(self._computations.items()) if number in used]

    @property
    def n_unreadable_entries(self) -> int:
        """Number of entries that were looked at and cannot be decoded."""
        return sum(entry is None for log in self._logs.values() for entry in log.entries.values())

    def n_parts(self) -> int | None:
        """Return the number of parts; ``None`` until the source was read to its end."""
        if self.n_rows is None or self.arguments is None:
            return None
        return -(-self.n_rows // int(self.arguments["rows_per_part"]))


class Journal(JournalState):
    """Journal as one worker of the run sees it and adds to it; use it as a context manager.

    Args:
        lease_s: Seconds without a heartbeat after which another worker may take over this one's parts.

    Raises:
        CorpusError: the folder cannot be read or written, or was written by an older babeltower.
    """

    def __init__(self, store: Store, *, lease_s: float = LEASE_S) -> None:
        super().__init__(store)
        self._lock = threading.RLock()
        self._own: dict[int, int] = {}
        self._finished_here: set[int] = set()
        self._declined: set[int] = set()
        self._computation = 0
        self._begins = False
        self._is_new = not store.exists()
        if not self._is_new:
            _require_current_layout(store)
        _check_conditional_writes(store)
        self.fleet = Fleet(store, lease_s)
        self.fleet.start()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished_here(self) -> Collection[int]:
        """Parts that this worker finished."""
        return self._finished_here

    def known_arguments(self) -> Mapping[str, Any] | None:
        """Return the arguments of the run, or ``None`` if this worker is to determine them.

        While another worker determines them, for example by measuring engines, this one waits, so that all
        workers of a new folder take what the first one measured.
        """
        is_waiting = False
        while True:
            with self._lock:
                self.refresh()
                latest = self._log(_RUN).latest
                if self.arguments is not None:
                    return self.arguments
                starter = latest.get("worker") if "starting" in latest else None
                if starter is None or not self.fleet.is_alive(starter):
                    if self._append(_RUN, {"starting": True}):
                        self._begins = True
                        return None
                    continue
            if not is_waiting:
                LOGGER.info("waiting for worker %s, which is starting this run", starter)
                is_waiting = True
            time.sleep(_POLL_S)

    def agree(
        self,
        arguments: Mapping[str, Any],
        *,
        change: SourceChange = SourceChange.NONE,
        n_rows: int | None = None,
    ) -> None:
        """Record the arguments of a new run, or check that they are those of the folder's run.

        Other arguments replace those of a run that has finished no part and has no other worker.

        Args:
            change: Change of the source since the parts were finished. A grown source embeds its last part
                again if that was not full; of a changed one the caller reopened the parts before.
            n_rows: Rows of the changed source, if they are known; else it is read to its end again.

        Raises:
            CorpusError: the folder belongs to a run with other arguments; the message names each one.
        """
        plain = json.loads(json.dumps(arguments))
        while True:
            with self._lock:
                self.refresh()
                is_changed = (
                    change is SourceChange.CHANGED and self.n_rows is not None and self.n_rows != n_rows
                )
                if self.arguments == plain and not is_changed:
                    self._describe()
                    break
                if self.arguments is not None:
                    if self.done or self.lost or self._others():
                        self._require_agreement(plain, change)
                        if change is SourceChange.GROWN:
                            self._reopen_last(int(plain["rows_per_part"]))
                    else:
                        self._remove_stray_parts()
                if self._append(_RUN, {"journal": VERSION, "arguments": plain}):
                    self.refresh()
                    self._describe()
                    break
        if n_rows is not None:
            self.end(n_rows)

    def require_agreement(self, arguments: Mapping[str, Any], change: SourceChange) -> None:
        """Check that a run with these arguments may go on with the folder's parts; nothing is written.

        Raises:
            CorpusError: the folder belongs to a run with other arguments; or its source was changed, and
                other workers are still at work on the former one.
        """
        with self._lock:
            self.refresh()
            if self.arguments is not None and (self.done or self.lost or self._others()):
                self._require_agreement(json.loads(json.dumps(arguments)), change)

    def _require_agreement(self, plain: Mapping[str, Any], change: SourceChange) -> None:
        found = self.arguments or {}
        is_allowed = change is not SourceChange.NONE
        known = {**found, "source": plain.get("source")} if is_allowed else found
        _require_same(self.store.location, known, plain)
        others = self._others()
        if change is SourceChange.CHANGED and found.get("source") != plain.get("source") and others:
            raise CorpusError(
                f"{len(others)} other workers embed the former state of the source into "
                f"{self.store.location}, among them {others[0]}. End them, then pass --recheck-input."
            )

    def _describe(self) -> None:
        """Write the file for ``datasets`` unless it is there; remove what killed workers left."""
        if self.store.read(_DATASET_FILE) != _DATASET:
            self.store.replace(_DATASET_FILE, _DATASET)
        if not self._others():
            for folder in _WRITTEN_TO:
                self.store.remove_unfinished(folder)
            self._remove_beyond_end()

    def _reopen_last(self, rows_per_part: int) -> None:
        parts = {**self.done, **self.lost}
        if parts and parts[max(parts)].rows < rows_per_part:
            self.reopen([max(parts)])

    def _remove_beyond_end(self) -> None:
        """Remove parts after the source's last one, which it had before it shrank: records, then files."""
        n_parts = self.n_parts()
        if n_parts is None:
            return
        self.reopen([part for part in {**self.done, **self.lost} if part >= n_parts])
        for name in sizes_of_files(self.store):
            match = _PART.search(name)
            if match and int(match[1]) >= n_parts:
                self.store.remove(name)

    def _others(self) -> list[str]:
        """Return the other workers that are alive."""
        names = workers_of_store(self.store)
        return [name for name in names if name != self.fleet.name and self.fleet.is_alive(name)]

    def _remove_stray_parts(self) -> None:
        for name in sizes_of_files(self.store):
            self.store.remove(name)

    def begin(self, computation: Computation, accepted: Collection[ComputationChange]) -> None:
        """Record this worker's computation, after checking it against those of parts and other workers.

        Raises:
            CorpusError: the others compute otherwise, and the change was not accepted.
        """
        plain: Computation = json.loads(json.dumps(computation))
        while True:
            with self._lock:
                self.refresh()
                said = (self.fleet.said_of(name).get("computation", 0) for name in self._others())
                numbers = {
                    *said,
                    *(self._computed_by[part] for part in self.done),
                } & self._computations.keys()
                known = [self._computations[number] for number in sorted(numbers)]
                require_acceptable(known, plain, accepted, holder=self.store.location)
                same = [number for number, found in self._computations.items() if found == plain]
                if not same and not self._append(_RUN, {"computation": plain}):
                    continue
                self._computation = same[0] if same else self._log(_RUN).last
                self.fleet.said["computation"] = self._computation
                self.fleet.beat()
                self._fold()
                return

    def begin_pass(self) -> None:
        """Read what other workers did, before the source is read from its start."""
        with self._lock:
            self.fleet.look_again()
            self.refresh()
            self._declined = set()

    def wants(self, part: int) -> bool:
        """Return True if a part may be claimed, as far as this worker knows.

        A part that was once refused is refused until the next pass, since its first rows may be gone by.
        """
        with self._lock:
            if part in self._own:
                return True
            if part in self._declined or part in self.done or self._is_held(part):
                self._declined.add(part)
                return False
            return True

    def _is_held(self, part: int) -> bool:
        holder = self.held.get(part)
        return holder is not None and self.fleet.is_alive(holder)

    def claim(self, part: int) -> bool:
        """Claim a part for this worker; False if it is finished, or another living worker holds it."""
        with self._lock:
            if part in self._own:
                return True
            if not self.wants(part):
                return False
            log = self._log(part_name(part))
            if not self._append(part_name(part), {"claimed": time.time()}):
                self._declined.add(part)
                return False
            self._own[part] = log.last
            self.held[part] = self.fleet.name
            if log.last > 1:
                self._remove_leftovers(part)
            return True

    def _remove_leftovers(self, part: int) -> None:
        """Remove files that an earlier worker of a part left without a record."""
        for folder in _PART_FOLDERS:
            self.store.remove_unfinished(f"{folder}{part_name(part)}.")
        for name in files_of_part(part):
            self.store.remove(name)

    def holds(self, part: int) -> bool:
        """Return True if no other worker took over a part that this one claimed."""
        with self._lock:
            number = self._own.get(part)
            return number is not None and self.store.read(_path(part_name(part), number + 1)) is None

    def finish(self, record: PartRecord) -> bool:
        """Record a part whose files are in place.

        Returns:
            False if another worker took the part over meanwhile; it embeds the part again.
        """
        with self._lock:
            part = record.part
            number = self._own.pop(part)
            entry = {"done": asdict(record), "computation": self._computation}
            if not self._create(part_name(part), number + 1, entry):
                LOGGER.warning(
                    "part %d was taken over by another worker, since this one was taken for dead", part
                )
                self._declined.add(part)
                return False
            self.held.pop(part, None)
            self.lost.pop(part, None)
            self.done[part] = record
            self._computed_by[part] = self._computation
            self._finished_here.add(part)
            return True

    def reopen(self, parts: Collection[int]) -> None:
        """Record that finished parts are to be embedded again, by any worker."""
        with self._lock:
            for part in parts:
                if self._append(part_name(part), {"again": True}):
                    self.done.pop(part, None)
                    self.lost.pop(part, None)

    def drop(self, part: int) -> None:
        """Give up a part that another worker took over."""
        with self._lock:
            self._own.pop(part, None)
            self._declined.add(part)

    def end(self, n_rows: int) -> None:
        """Record that the source ends after ``n_rows`` rows."""
        while True:
            with self._lock:
                self.refresh()
                if self.n_rows == n_rows:
                    return
                if self._append(_RUN, {"end": n_rows}):
                    self.n_rows = n_rows
                    self._remove_beyond_end()
                    return

    def unfinished(self, shard: Shard) -> Iterator[tuple[int, bool]]:
        """Yield each unfinished part of a shard, and whether it may be claimed now."""
        for part in range(self.n_parts() or 0):
            if shard.has(part) and part not in self.done:
                yield part, not self._is_held(part)

    def _append(self, log: str, entry: Mapping[str, Any]) -> bool:
        """Add an entry after the last known one; False if another worker was first."""
        return self._create(log, self._log(log).last + 1, entry)

    def _create(self, log: str, number: int, entry: Mapping[str, Any]) -> bool:
        whole = {"worker": self.fleet.name, **entry}
        data = json.dumps(whole, ensure_ascii=False).encode() + b"\n"
        if not self.store.create(_path(log, number), data, durably="claimed" not in entry):
            return False
        self._log(log).entries[number] = whole
        return True

    def close(self) -> None:
        """Release what this worker holds, and leave no trace of a run that could not start."""
        self.fleet.stop()
        self.fleet.forget_dead(workers_of_store(self.store))
        if not self._others():
            for stem in (f"{_FOLDER}/", "_run"):
                self.store.remove_unfinished(stem)
        if self._begins and self.arguments is None:
            for number in self._log(_RUN).entries:
                self.store.remove(_path(_RUN, number))
            if self._is_new:
                self.store.remove_empty(_FOLDER)
                self.store.remove_empty("")


_WORKER = re.compile(r"worker-(.+)\.json")


def state_of_store(store: Store) -> JournalState:
    """Read a folder's journal.

    Raises:
        CorpusError: the folder holds no journal of this version, or cannot be read.
        DamagedVectorsError: the journal is damaged.
    """
    state = JournalState(store)
    if store.exists():
        _require_current_layout(store)
        state.refresh()
    if state.arguments is None:
        if n_unreadable := state.n_unreadable_entries:
            raise DamagedVectorsError(
                f"The journal of {store.location} is damaged: {n_unreadable} of its entries in "
                f"{store.path(_FOLDER)} cannot be read, and none says what the run was. Restore the folder, "
                "or run the same babeltower embed command again, which writes all parts anew."
            )
        raise CorpusError(
            f"{store.location} holds no output of babeltower embed: it has no {_FOLDER}. Pass a folder that "
            "babeltower embed wrote."
        )
    return state


def is_former_journal(name: str) -> bool:
    """Return True for the name of a journal of version 1 or 2."""
    return _FORMER.fullmatch(name) is not None


def workers_of_store(store: Store) -> list[str]:
    """Return the names of the workers that have a file in the journal; they may be dead."""
    return [match[1] for name in sorted(store.names(_FOLDER)) if (match := _WORKER.fullmatch(name))]


def sizes_of_files(store: Store) -> dict[str, int]:
    """Return the size of each file of a part, recorded or not."""
    return {
        f"{folder}{name}": size
        for folder in _PART_FOLDERS
        for name, size in store.names(folder.rstrip("/")).items()
        if name.startswith("part-")
    }


def files_of_part(part: int) -> tuple[str, str, str]:
    """Return the names of the files that a part may have: vectors, bad rows, array."""
    stem = part_name(part)
    return f"{stem}.parquet", f"{BAD_ROWS}/{stem}.parquet", f"_npy/{stem}.npy"


def computations_of_folder(location: Path) -> list[Computation]:
    """Return the distinct computations of a folder's parts, also of one that an older babeltower wrote."""
    store = store_from_location(location)
    if not location.is_dir():
        return []
    former = [name for name in store.names() if is_former_journal(name)]
    if not former:
        state = JournalState(store)
        state.refresh()
        return state.computations
    found: list[Computation] = []
    for name in sorted(former):
        for line in (store.read(name) or b"").splitlines():
            entry = _entry_from_bytes(line)
            if entry is None:
                break
            if isinstance(entry.get("computation"), dict) and entry["computation"] not in found:
                found.append(entry["computation"])
    return found


def _check_conditional_writes(store: Store) -> None:
    from runtime.corpus.stores.objects import ObjectStore

    if isinstance(store, ObjectStore):
        store.require_conditional_writes(f"{_FOLDER}/probe-{time.time_ns():x}")


def _entry(log: str, number: int) -> str:
    return f"{log}.{number:04d}.json"


def _path(log: str, number: int) -> str:
    return f"{_FOLDER}/{_entry(log, number)}"


def _entry_from_bytes(data: bytes) -> Mapping[str, Any] | None:
    """Decode an entry; ``None`` if it was cut short, which only a file system without links allows."""
    try:
        entry = json.loads(data)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _record_from_entry(data: Mapping[str, Any]) -> PartRecord:
    names = {field.name for field in fields(PartRecord)}
    return PartRecord(**{name: value for name, value in data.items() if name in names})


def _require_version(entry: Mapping[str, Any], store: Store) -> None:
    if entry.get("journal") != VERSION:
        raise CorpusError(
            f"{store.location} has a journal of version {entry.get('journal')}; this babeltower reads "
            f"{VERSION}. Use the babeltower that wrote it, or choose another output folder."
        )


def _require_current_layout(store: Store) -> None:
    former = sorted(name for name in store.names() if is_former_journal(name))
    if former:
        raise CorpusError(
            f"{store.path(former[0])} is a journal of an older babeltower, whose run this one cannot go on "
            "with. Its vectors can be indexed and searched if the run is finished; else finish it with that "
            "babeltower, or choose another output folder."
        )


def _require_same(location: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that the arguments are those of the journal.

    Raises:
        CorpusError: an argument differs; the message names each one.
    """
    differing = [
        f"{name} was {found.get(name)!r} and is now {asked.get(name)!r}"
        for name in dict.fromkeys([*found, *asked])
        if found.get(name) != asked.get(name)
    ]
    if differing:
        remark = remark_on_vectors(str(found.get("fingerprint")), str(asked.get("fingerprint")))
        if all(found.get(name) == asked.get(name) for name in asked if name != "source"):
            remark += (
                " If the same source was changed, --recheck-input reads the finished parts again and embeds "
                "those whose rows differ."
            )
        raise CorpusError(
            f"{location} belongs to a run with other arguments: {'; '.join(differing)}. Run the original "
            f"command to resume it, or choose another output folder.{remark}"
        )
