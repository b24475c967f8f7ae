"""Parquet, Arrow and Feather files, and Hugging Face datasets on disk, read in pieces."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.corpus.files import File, FileSet
from runtime.corpus.locations import partitions_of
from runtime.corpus.reading import is_local
from runtime.corpus.rows import NO_COLUMN, Columns, IdType, Needs, Problem, Rows
from runtime.corpus.sources.base import (
    ID_NAMES,
    LANGUAGE_NAMES,
    PIECE_BYTES,
    PIECE_IMAGES,
    PIECE_TEXTS,
    CaptionUse,
    Reading,
    SourceFormat,
    chosen_columns,
    modality_of,
    usual_column,
)
from runtime.corpus.sources.cells import MOST_CHARACTERS, too_long
from runtime.corpus.sources.column_types import (
    arrow_column,
    id_type_of,
    is_list,
    is_string,
    is_uint64,
    require_types,
    unusable,
)
from runtime.corpus.sources.opened import SourceFiles, damage_reported
from runtime.corpus.sources.parquet_table import ParquetTable
from runtime.corpus.sources.records import Cells
from runtime.errors import ChangedInputError, DamagedFileError, InputError
from runtime.manifest import Modality

__all__ = ["TableSource", "files_of_dataset"]

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class _Look:
    """What the footer of a file tells; ``n_rows`` is ``None`` if its batches must be counted."""

    schema: Any
    n_rows: int | None


class TableSource:
    """Columnar files; all footers are read first, and rows that are not needed are skipped.

    Raises:
        InputError: a file cannot be read, or columns are missing, ambiguous or of another type.
    """

    def __init__(
        self, name: str, format_: SourceFormat, files: FileSet, columns: Columns, reading: Reading
    ) -> None:
        self.name, self.format = name, format_
        self._files = SourceFiles(name, files, reading, what=f"{format_.value} files")
        looks = self._files.looked_at(self._look)
        self.files, self.patience, self.bad_files = self._files.all, self._files.patience, self._files.bad
        self.notes, self.n_files = self._files.notes, len(self._files)
        shown = [file.shown for file in self.files.files]
        names = {
            shown[i]: [*look.schema.names, *self.partitions(i, look.schema.names)]
            for i, look in looks.items()
        }
        self.columns = chosen_columns(self._without_unusable(columns, looks), names)
        schemas = {shown[i]: look.schema for i, look in looks.items()}
        for where, schema in schemas.items():
            require_types(self.columns, schema, where, reading)
        self.id_type = id_type_of(self.columns, schemas, reading)
        if reading.id_type is None and any(is_uint64(s, self.columns.id) for s in schemas.values()):
            self.notes.append(
                f"the ids {self.columns.id!r} are of type uint64, whose numbers int64 cannot hold, and are "
                "stored as strings; --id-type int64 stores integers"
            )
        self.modality = modality_of(self.columns)
        self._counts = {i: look.n_rows for i, look in looks.items() if look.n_rows is not None}
        text = self.columns.text
        self._is_expanded = reading.captions is CaptionUse.EACH and any(
            text is not None and is_list(schema, text) for schema in schemas.values()
        )
        if self._is_expanded and self.columns.id is not None:
            self.id_type = IdType.STRING  # ID#0, ID#1, …

    def partitions(self, file: int, own: Collection[str]) -> dict[str, str | None]:
        """Return the Hive partitions that a file's folders name, without those that are its own columns."""
        found = partitions_of(self._files[file].name)
        return {name: value for name, value in found.items() if name not in own}

    def _look(self, number: int) -> _Look:
        with self._opened(number) as table:
            table.require_end()
            return _Look(table.schema, table.n_rows_of_footer())

    def _without_unusable(self, asked: Columns, looks: dict[int, _Look]) -> Columns:
        """Ask for no id or language column where the usual name has values of a type that cannot be one."""
        changed = {}
        roles = (("id", asked.id, ID_NAMES), ("language", asked.language, LANGUAGE_NAMES))
        for role, column, usual in roles:
            first = looks[0].schema
            guess = usual_column(first.names, usual) if column is None else None
            if guess is None or guess in (asked.text, asked.image):
                continue
            bad = next(
                (t for look in looks.values() if (t := unusable(look.schema, guess)) is not None), None
            )
            if bad is not None:
                changed[role] = NO_COLUMN
                self.notes.append(f"column {guess!r} is of type {bad} and was not taken as the {role} column")
        return Columns(
            changed.get("id", asked.id), asked.text, asked.image, changed.get("language", asked.language)
        )

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return self._files.identity()

    def n_rows(self, file: int) -> int | None:
        """Return the rows of a file, from its footer or batches; ``None`` if lists of captions are rows."""
        if self._is_expanded:
            return None
        if file not in self._counts:
            with self._opened(file) as table:
                self._counts[file] = table.n_rows()
        return self._counts[file]

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield the rows of a file, skipping those that are not needed.

        Raises:
            DamagedFileError: a page or batch is damaged.
        """
        if self._is_expanded:
            return self._files.to_proven_end(file, self._read(file, _everything))
        return self._with_damaged_rows(file, needs)

    def _read(self, file: int, needs: Needs) -> Iterator[Rows]:
        columns = self.columns
        opened = self._files[file]
        item = columns.text or columns.image or ""
        captions = self._files.reading.captions
        cells = Cells(columns, self.id_type, opened.filesystem, opened.folder, captions)
        most = PIECE_TEXTS if self.modality is Modality.TEXT else PIECE_IMAGES
        most_bytes = MOST_CHARACTERS + 1 if self.modality is Modality.TEXT else None
        stop = 0
        with self._opened(file) as table:
            partitions = self.partitions(file, table.schema.names)
            wanted = [
                name
                for name in dict.fromkeys((columns.id, item, columns.language))
                if name is not None and name not in partitions
            ]
            for start, batch in table.batches(wanted, most, needs, most_bytes=most_bytes):

                def column(name: str | None, batch: Any = batch) -> list[Any] | None:
                    if name is None:
                        return None
                    if name in partitions:
                        return [partitions[name]] * batch.num_rows
                    return _cells(arrow_column(batch, name), is_text=name == columns.text)

                rows = cells.rows(
                    stop if self._is_expanded else start,
                    column(columns.id),
                    column(item) or [],
                    column(columns.language),
                )
                yield rows
                stop = rows.stop

    def _with_damaged_rows(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield a file's rows; from damage on, if the reading sets files aside, as bad rows."""
        start = 0
        try:
            for rows in self._read(file, needs):
                yield rows
                start = rows.stop
        except DamagedFileError as error:
            if not self._files.reading.skip_bad_files:
                raise
            problem, n_rows = Problem("damaged-file", str(error)), self.n_rows(file) or 0
            for at in range(start, n_rows, PIECE_TEXTS):
                n = min(PIECE_TEXTS, n_rows - at)
                if needs(at, at + n):
                    yield Rows(at, [None] * n, [problem] * n)

    def opened(self, file: int) -> contextlib.AbstractContextManager[ParquetTable | _ArrowTable]:
        """Open a file, to read columns of it by row numbers."""
        return self._opened(file)

    @contextlib.contextmanager
    def _opened(self, file: int) -> Iterator[ParquetTable | _ArrowTable]:
        opened = self._files[file]
        with damage_reported(opened, self.format.value):
            table: ParquetTable | _ArrowTable
            if self.format is SourceFormat.PARQUET:
                table = ParquetTable(self._files, file)
            else:
                table = _ArrowTable(self._files, file)
            with contextlib.closing(table):
                yield table


def _cells(column: Any, *, is_text: bool) -> list[Any]:
    """Return the cells of an Arrow column; in place of texts that are too long, their problems."""
    import pyarrow.compute

    cells: list[Any]
    if not is_text or not is_string(column.type) or column.nbytes <= MOST_CHARACTERS:
        cells = column.to_pylist()
        return cells
    lengths = pyarrow.compute.binary_length(column)
    is_long = pyarrow.compute.greater(lengths, MOST_CHARACTERS)
    cells = pyarrow.compute.if_else(is_long, pyarrow.scalar(None, column.type), column).to_pylist()
    for i, (long, n_bytes) in enumerate(zip(is_long.to_pylist(), lengths.to_pylist(), strict=True)):
        if long:
            cells[i] = too_long(n_bytes, "text", "bytes or more")
    return cells


def _everything(start: int, stop: int) -> bool:
    return True


class _ArrowTable:
    """Arrow file or stream; Feather (version 2) is an Arrow file."""

    def __init__(self, files: SourceFiles, number: int) -> None:
        import pyarrow

        self._mapping = _mapping(files, number)
        if self._mapping is None:
            self._opened = pyarrow.PythonFile(files.raw(number), mode="r")
        else:
            self._opened = pyarrow.BufferReader(pyarrow.py_buffer(self._mapping.pages))
        self._file: Any = None
        try:
            self._file = pyarrow.ipc.open_file(self._opened)
            self.schema = self._file.schema
        except pyarrow.ArrowInvalid:
            self._opened.seek(0)
            if self._opened.read(4) == b"FEA1":
                raise InputError(
                    f"{files[number].shown} is Feather of version 1, which is not Arrow. Write it again: "
                    "pyarrow.feather.write_feather(pyarrow.feather.read_table(FILE), NEW)."
                ) from None
            self._opened.seek(0)
            self._stream = pyarrow.ipc.open_stream(self._opened)
            self.schema = self._stream.schema

    def require_end(self) -> None:
        """Check that a stream ends with its mark; a file has a footer, without which it is not opened.

        Raises:
            EOFError: the mark is missing: the stream is cut off.
        """
        if self._file is not None:
            return
        position, size = self._opened.tell(), self._opened.size()
        self._opened.seek(max(0, size - len(_END_OF_STREAM)))
        end = self._opened.read()
        self._opened.seek(position)
        if end != _END_OF_STREAM:
            raise EOFError(
                "the stream ends without its end mark, so it was cut off or is still being written"
            )

    def n_rows_of_footer(self) -> int | None:
        return None

    def n_rows(self) -> int:
        return sum(batch.num_rows for batch in self._record_batches())

    def batches(
        self, columns: Sequence[str], size: int, needs: Needs, *, most_bytes: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        row = 0
        for batch in self._record_batches():
            mean = batch.nbytes / max(1, batch.num_rows)
            most = max(1, min(size, int(PIECE_BYTES / max(1.0, mean))))
            for start in range(0, batch.num_rows, most):
                stop = min(start + most, batch.num_rows)
                if needs(row + start, row + stop):
                    self._require_whole()
                    yield row + start, batch.slice(start, stop - start)
                    self._release()
            row += batch.num_rows

    def _record_batches(self) -> Iterator[Any]:
        if self._file is None:
            yield from self._stream
        else:
            for number in range(self._file.num_record_batches):
                self._require_whole()
                yield self._file.get_batch(number)

    def _require_whole(self) -> None:
        if self._mapping is not None:
            self._mapping.require_whole()

    def _release(self) -> None:
        if self._mapping is not None:
            self._mapping.release()

    def close(self) -> None:
        self._opened.close()
        if self._mapping is not None:
            self._mapping.close()


class _Mapping:
    """Local file mapped into memory.

    Attributes:
        pages: The mapping; what was read of it counts as this process's memory until it is released.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._opened = Path(file.path).open("rb")  # noqa: SIM115 - closed with the table
        self.pages = mmap.mmap(self._opened.fileno(), 0, access=mmap.ACCESS_READ)

    def require_whole(self) -> None:
        """Check that the file is not shorter than its mapping: reading there would end the process.

        Raises:
            ChangedInputError: it was cut since it was opened.
        """
        n_bytes = os.fstat(self._opened.fileno()).st_size
        if n_bytes < len(self.pages):
            raise ChangedInputError(
                f"{self._file.shown} had {len(self.pages):,} bytes when it was opened and now has "
                f"{n_bytes:,}. Restore it, and run the command again."
            )

    def release(self) -> None:
        """Give pages back that were read; they are read again where they are still used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file; the mapping ends with the last batch that uses it."""
        self._opened.close()


def _mapping(files: SourceFiles, number: int) -> _Mapping | None:
    file = files[number]
    if not is_local(file.filesystem) or not file.n_bytes:
        return None
    files.patience.call(file.shown, lambda: _readable(file), absent_may_pass=True)
    return files.patience.call(file.shown, lambda: _Mapping(file), absent_may_pass=True)


def _readable(file: File) -> None:
    """Read a byte, so that a fault of storage is an error here; in a mapping it would end the process."""
    with Path(file.path).open("rb") as opened:
        opened.read(1)


def files_of_dataset(name: str, files: FileSet) -> FileSet:
    """Return the Arrow files of a dataset written by ``datasets.save_to_disk``, in dataset order.

    Raises:
        InputError: the dataset has several splits, or files are missing.
    """
    by_name = {file.name: file for file in files.files}
    prefix = ""
    if "dataset_dict.json" in by_name:
        splits = _json(by_name["dataset_dict.json"])["splits"]
        if len(splits) != 1:
            raise InputError(f"{name} has splits {splits}; pass one of them, e.g. {name}/{splits[0]}.")
        prefix = f"{splits[0]}/"
    if f"{prefix}state.json" not in by_name:
        raise InputError(f"{name} has no {prefix}state.json, so it is not a dataset saved to disk.")
    state = _json(by_name[f"{prefix}state.json"])
    wanted = [prefix + entry["filename"] for entry in state["_data_files"]]
    if missing := [entry for entry in wanted if entry not in by_name]:
        raise InputError(f"{name} lacks {missing[0]}, which its state.json lists. Copy the dataset again.")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(
            f"{name} was saved with an order of its own (indices). Call flatten_indices() before saving it."
        )
    return files.kept(by_name[entry] for entry in wanted)


def _json(file: File) -> dict[str, Any]:
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            found: dict[str, Any] = json.loads(str(opened.read(), "utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{file.shown} is not JSON ({error}). Copy the dataset again.") from error
    return found
