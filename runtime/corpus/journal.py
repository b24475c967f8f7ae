"""Journal of a run's finished parts, so that each row is written exactly once.

A file of JSON lines beside the parts. The first line holds the arguments that determine the output; each
further line records the computation of the parts that follow, or a finished part. A part's line is written
only after its files are on disk under their final names, so after any interruption a part is either in the
journal or embedded again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from runtime.corpus.atomic import write_atomically
from runtime.corpus.computation import Computation, ComputationChange, require_acceptable
from runtime.errors import CorpusError
from runtime.fingerprints import remark_on_vectors

__all__ = ["VERSION", "Journal", "PartRecord", "Shard", "computations_of_folder", "header_of_journal"]

VERSION = 2
"""Version of the journal; version 1 did not record the computation of its parts."""


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
        """Suffix of the shard's journal and record file names."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"

    def has(self, part: int) -> bool:
        """Check whether a part belongs to this shard."""
        return part % self.count == self.index


@dataclass(frozen=True, slots=True)
class PartRecord:
    """Record of a finished part.

    Attributes:
        part: Number of the part.
        rows: Source rows of the part, good and bad.
        files: Path relative to the output folder → size in bytes.
        counts: Nonzero fields of ``Counts``.
        bad_kinds: Kind of problem → number of rows.
        content: Hash of what was read for the part; empty in journals of older versions.
    """

    part: int
    rows: int
    files: Mapping[str, int]
    counts: Mapping[str, int]
    bad_kinds: Mapping[str, int]
    content: str = ""


class Journal:
    """Journal opened by one run and locked against a second one.

    Args:
        folder: Output folder; created if missing.
        arguments: Arguments that determine the output. A journal with other arguments is rejected.

    Raises:
        CorpusError: other arguments, another active run, or a journal that cannot be read or written.
    """

    def __init__(self, folder: Path, shard: Shard, arguments: Mapping[str, Any]) -> None:
        self._folder = folder
        self.path = folder / f"journal{shard.suffix}.jsonl"
        self.done: dict[int, PartRecord] = {}
        self.n_rows: int | None = None
        self.computations: list[Computation] = []
        self._has_begun = False
        self.is_former = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / f".{self.path.name}.lock").open("wb")
        except OSError as error:
            raise CorpusError(
                f"{folder} cannot be used as an output folder: {error}. Choose another one."
            ) from error
        try:
            _lock(self._lock, self.path)
            self._require_same_arguments(arguments)
            self._file = self.path.open("r+b", buffering=0)
        except BaseException:
            self._lock.close()
            raise
        self._load()

    def _require_same_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Check that runs sharing the folder agree in everything but the shard's index."""
        for path in sorted(self._folder.glob("journal*.jsonl")):
            header = header_of_journal(path)
            if header is not None:
                _require_same(path, header, arguments)
        if not self.path.exists():
            header_line = _header_line(arguments)
            write_atomically(self.path, lambda path: path.write_text(header_line, encoding="utf-8"))

    def _load(self) -> None:
        """Read the finished parts; an incomplete line ends the journal and is removed."""
        good = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True)):
            try:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                if number:
                    self._take(record)
                else:
                    self.is_former = record["journal"] < VERSION
            except (ValueError, TypeError, KeyError):
                break
            good += len(line)
        self._file.seek(good)
        self._file.truncate()

    def _take(self, record: Mapping[str, Any]) -> None:
        if "end" in record:
            self.n_rows = record["end"]
            return
        if "computation" in record:
            self._begin(dict(record["computation"]))
            return
        if "again" in record:
            self.done.pop(record["again"], None)
            return
        self._has_begun = True
        done = PartRecord(**record)
        if all(_size(self._folder / name) == size for name, size in done.files.items()):
            self.done[done.part] = done

    def begin(self, computation: Computation, accepted: Collection[ComputationChange]) -> None:
        """Record the computation of the following parts, after checking it against the existing ones.

        Raises:
            CorpusError: existing parts have another computation, and the change was not accepted.
        """
        own = self.computations if self._has_begun else self.computations[:-1]
        known = [*own, *computations_of_folder(self._folder, but=self.path)]
        require_acceptable(known, computation, accepted, holder=self._folder)
        if self.is_former:
            self._renew()
        if not self.computations or self.computations[-1] != computation:
            self._append({"computation": computation})
            self._begin(computation)

    def _begin(self, computation: Computation) -> None:
        """Add a computation, replacing the last one if it produced no part."""
        if self.computations and not self._has_begun:
            self.computations.pop()
        self.computations.append(computation)
        self._has_begun = False

    def _renew(self) -> None:
        """Upgrade a version 1 header, so that older readers do not truncate lines they cannot read."""
        arguments = header_of_journal(self.path)
        self._file.seek(0)
        lines = self._file.read().split(b"\n", 1)[1]
        content = _header_line(arguments or {}).encode() + lines
        self._file.close()
        write_atomically(self.path, lambda path: path.write_bytes(content))
        self._file = self.path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)

    def add(self, record: PartRecord) -> None:
        """Record a part whose files are in place."""
        self._append(asdict(record))
        self.done[record.part] = record
        self._has_begun = True

    def reopen(self, parts: Collection[int]) -> None:
        """Record that finished parts are to be embedded again."""
        for part in parts:
            self._append({"again": part})
            self.done.pop(part, None)

    def end(self, n_rows: int) -> None:
        """Record that the source ends after ``n_rows`` rows."""
        if self.n_rows != n_rows:
            self._append({"end": n_rows})
            self.n_rows = n_rows

    def _append(self, record: Mapping[str, Any]) -> None:
        start = self._file.tell()
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise CorpusError(
                f"{self.path} cannot be written: {error}. Free disk space and run the same command again to "
                "resume."
            ) from error

    def close(self) -> None:
        """Close and unlock the journal."""
        self._file.close()
        self._lock.close()


def header_of_journal(path: Path) -> dict[str, Any] | None:
    """Return the arguments of a journal, or ``None`` if the file is missing.

    Raises:
        CorpusError: the file is not a journal of a known version.
    """
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
        if header["journal"] not in (1, VERSION):
            raise ValueError(f"it has version {header['journal']}")
        arguments: dict[str, Any] = header["arguments"]
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CorpusError(
            f"{path.parent} is not a folder, so no output can be written to it. Choose another output folder."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{path} is not a journal that this babeltower can read ({error}). Choose another output folder."
        ) from error
    return arguments


def _require_same(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
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
        raise CorpusError(
            f"{path} belongs to a run with other arguments: {'; '.join(differing)}. Run the original command "
            f"to resume it, or choose another output folder.{remark}"
        )


def _header_line(arguments: Mapping[str, Any]) -> str:
    return json.dumps({"journal": VERSION, "arguments": arguments}, ensure_ascii=False) + "\n"


def computations_of_folder(folder: Path, *, but: Path | None = None) -> list[Computation]:
    """Return the distinct computations recorded in a folder's journals; version 1 recorded none."""
    found: list[Computation] = []
    for path in sorted(folder.glob("journal*.jsonl")):
        if path != but:
            found += [each for each in _computations_of_journal(path) if each not in found]
    return found


def _computations_of_journal(path: Path) -> list[Computation]:
    """Return the computations of a journal's parts; an incomplete line ends the journal."""
    found: list[Computation] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if isinstance(record, dict) and isinstance(record.get("computation"), dict):
            found.append(record["computation"])
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CorpusError(f"Another run is writing {path}. Wait for it to finish, or stop it.") from None
