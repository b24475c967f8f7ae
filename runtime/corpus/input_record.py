"""Record of what a run read, kept beside its vectors: files with their versions, pictures, damaged files.

``_input/files.jsonl.zst`` holds a line per file of the source, ``_input/part-00000.jsonl.zst`` one per
picture behind a path column that the part read. A resumed run compares them with what is there now, so that
no output mixes two states of a source; the hash of what each part read is in the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from runtime.corpus.faults import FaultKind, Patience, fault_kind
from runtime.corpus.files import File
from runtime.corpus.journal import BAD_ROWS
from runtime.corpus.pictures import MISSING, Picture, has_entries
from runtime.corpus.reading import is_local
from runtime.corpus.sources import BadFile, ItemSource, Source, SourceFormat
from runtime.corpus.sources.stdin import STANDARD_INPUT, is_standard_input
from runtime.errors import ChangedInputError, CorpusError

__all__ = ["InputRecord", "is_nameless", "is_read_once"]

_FOLDER = "_input"
_NAMED = 5
"""Files that a message names; the others are counted."""


def is_nameless(source: Source) -> bool:
    """Check whether a source has no identity of its own and was given no name: its rows may be any others."""
    if isinstance(source, ItemSource):
        return source.identity() == "items"
    return any(is_standard_input(file) and file.name == STANDARD_INPUT for file in source.files.files)


def is_read_once(source: Source) -> bool:
    """Check whether a source can be read once only: an iterable, or standard input."""
    if isinstance(source, ItemSource):
        return source.is_read_once
    return any(map(is_standard_input, source.files.files))


class Folder(Protocol):
    """Place of the record: the output folder."""

    @property
    def location(self) -> str: ...

    def names(self, folder: str = "") -> Mapping[str, int]:
        """Return the files directly in a folder: name relative to it → size."""

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or ``None`` if there is no such file."""

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a file."""

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""


class InputRecord:
    """Record of the input below an output folder."""

    def __init__(self, folder: Folder) -> None:
        self._out = folder
        self._former: set[str] | None = None

    def require_same_files(self, source: Source, *, append: bool = False) -> None:
        """Check that the source's files are those that the folder's parts were read from.

        Args:
            append: Allow files that were added after all others.

        Raises:
            ChangedInputError: files were changed, added or removed, and the message names them; or the source
                is an iterable without a name.
        """
        has_parts = any(name.startswith("part-") for name in (*self._out.names(), *self._out.names(BAD_ROWS)))
        if not has_parts:  # nothing can be mixed
            return
        if is_nameless(source):
            raise ChangedInputError(
                f"{self._out.location} holds vectors of an iterable or of standard input, and nothing tells "
                "whether this one has the same rows. Pass name= (--name), the same in every run, or another "
                "output folder."
            )
        known = self._read("files")
        if known is not None:
            found = _differences(known, [_line_of_file(file) for file in source.files.files])
            if append:
                _require_last(self._out.location, found.pop("added"), list(known), source)
            _require_none(self._out.location, "files", found)

    def require_unchanged_while_read(self, source: Source) -> None:
        """Check that the local files of a source are still those that were listed before they were read.

        Images of a folder are not looked at: each is read as a whole, and the next run compares them.

        Raises:
            ChangedInputError: a file was written to meanwhile, so that parts may mix two states of it.
        """
        if source.format is SourceFormat.IMAGES:
            return
        changed = [file.shown for file in source.files.files if _is_changed(file)]
        if changed:
            raise ChangedInputError(
                f"{', '.join(changed[:_NAMED])} was changed while it was read, so that the parts may mix two "
                "states of it. Once its writer is done, run the same command with --recheck-input."
            )

    def require_same_pictures(self, parts: Iterable[int], patience: Patience) -> None:
        """Check that the local pictures behind a path column are those that finished parts read.

        Args:
            patience: Repetition where storage fails, or a picture's whole folder is away.

        Raises:
            ChangedInputError: some were changed or removed; the message names them.
            InputFaultError: storage failed for too long.
        """
        found: dict[str, list[str]] = {"changed": [], "removed": []}
        for part in parts:
            for picture in (self._read(_name_of_part(part)) or {}).values():
                path, mtime_ns = picture["path"], picture["mtime_ns"]
                if mtime_ns is None:
                    continue
                now = patience.call(f"The image {path}", partial(_stat_of_picture, Path(path)))
                if now is None:
                    found["removed"].append(path)
                elif (now.st_size, now.st_mtime_ns) != (picture["n_bytes"], mtime_ns):
                    found["changed"].append(path)
        _require_none(self._out.location, "pictures", found)

    def parts_of_found_folders(self, parts: Iterable[int]) -> list[int]:
        """Return the parts with pictures whose folders were missing when they were read and are there now."""
        return [
            part
            for part in parts
            if any(
                picture["n_bytes"] == MISSING and Path(path).parent.is_dir()
                for path, picture in (self._read(_name_of_part(part)) or {}).items()
            )
        ]

    def write_files(self, source: Source) -> None:
        """Record the source's files, unless they are recorded as they are.

        Raises:
            CorpusError: the record cannot be written.
        """
        lines = [_line_of_file(file) for file in source.files.files]
        if lines and self._read("files") != {line["path"]: line for line in lines}:
            self._write("files", lines)

    def write_pictures(self, part: int, pictures: Iterable[Picture]) -> None:
        """Record the pictures that a part read; call it before the part is noted as done."""
        lines = [asdict(picture) for picture in pictures]
        name = _name_of_part(part)
        if self._former is None:
            self._former = {f"{_FOLDER}/{former}" for former in self._out.names(_FOLDER)}
        if lines:
            self._write(name, lines)
        elif _path(name) in self._former:
            self._out.remove(_path(name))

    def with_bad_files(self, found: Iterable[BadFile]) -> tuple[BadFile, ...]:
        """Add files that were set aside to those that earlier runs recorded, and return all."""
        known = self._read("bad-files") or {}
        files = {**known, **{entry.name: {"path": entry.name, **asdict(entry)} for entry in found}}
        if files != known:
            self._write("bad-files", files.values())
        return tuple(BadFile(line["name"], line["n_rows_read"], line["reason"]) for line in files.values())

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        import pyarrow

        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        self._out.replace(_path(name), sink.getvalue().to_pybytes())

    def _read(self, name: str) -> dict[str, dict[str, Any]] | None:
        """Return the lines of a record by path; ``None`` if there is none."""
        import pyarrow

        data = self._out.read(_path(name))
        if data is None:
            return None
        try:
            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
                lines = stream.read().splitlines()
            return {line["path"]: line for line in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{self._out.location}/{_path(name)} cannot be read ({error}). Remove it to continue without "
                "a check of the input."
            ) from error


def _is_changed(file: File) -> bool:
    """Check whether a local file is another than when it was listed; one that is gone was read before."""
    if not is_local(file.filesystem) or not file.version.startswith("mtime "):
        return False
    try:
        now = Path(file.path).stat()
    except OSError:
        return False
    return (now.st_size, f"mtime {now.st_mtime_ns}") != (file.n_bytes, file.version)


def _stat_of_picture(path: Path) -> os.stat_result | None:
    """Return a file's size and times, or ``None`` if it was removed from a folder that holds others.

    Raises:
        OSError: storage failed, or the whole folder is missing or empty, as below an unmounted disk.
    """
    for _ in range(2):  # a mount that comes between the two looks is seen by the second one
        try:
            return path.stat()
        except OSError as error:
            if fault_kind(error) not in (FaultKind.ABSENT, FaultKind.OWN):
                raise
            if not has_entries(path.parent):
                raise OSError(
                    f"its folder {path.parent} is missing or empty; its disk or mount may be away. If its "
                    "pictures were removed, pass --recheck-input"
                ) from None
    return None


def _path(name: str) -> str:
    return f"{_FOLDER}/{name}.jsonl.zst"


def _name_of_part(part: int) -> str:
    return f"part-{part:05d}"


def _line_of_file(file: File) -> dict[str, Any]:
    return {"path": file.name, "n_bytes": file.n_bytes, "version": file.version}


def _differences(
    known: Mapping[str, Mapping[str, Any]], files: Iterable[dict[str, Any]]
) -> dict[str, list[str]]:
    now = {file["path"]: file for file in files}
    return {
        "changed": [path for path, file in now.items() if path in known and known[path] != file],
        "added": [path for path in now if path not in known],
        "removed": [path for path in known if path not in now],
    }


def _require_last(out: str, added: list[str], known: list[str], source: Source) -> None:
    """Check that added files come after all known ones, so that the rows of these keep their numbers."""
    names = [file.name for file in source.files.files]
    new, old = set(added), set(known)
    last = max((number for number, name in enumerate(names) if name in old), default=-1)
    early = [name for number, name in enumerate(names) if name in new and number < last]
    if early:
        raise ChangedInputError(
            f"{early[0]} was added to the source of {out} and sorts before {names[last]}, whose rows would "
            "get other numbers. Name new files so that they sort last, or embed them into another folder."
        )


def _require_none(out: str, what: str, differences: Mapping[str, list[str]]) -> None:
    said = []
    for how, paths in differences.items():
        if paths:
            more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            said.append(f"{how}: {', '.join(paths[:_NAMED])}{more}")
    if said:
        raise ChangedInputError(
            f"{out} holds vectors of another state of the source; {what} were {'; '.join(said)}. Restore "
            "them, choose another output folder, or pass --recheck-input to read the finished parts again "
            "and embed those whose rows changed; --append embeds files that were added after all others."
        )
