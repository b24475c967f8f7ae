"""Parquet, Arrow and Feather files, and Hugging Face datasets on disk, read in pieces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.corpus.files import File, FileSet, digest_of_files
from runtime.corpus.rows import Columns, IdType, Needs, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, PIECE_TEXTS, SourceFormat, chosen_columns
from runtime.corpus.sources.records import Cells, modality_of
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = ["TableSource", "files_of_dataset"]


class TableSource:
    """Columnar files that share a schema; rows that are not needed are skipped.

    Raises:
        InputError: a file cannot be read, or columns are missing or ambiguous.
    """

    def __init__(self, name: str, format_: SourceFormat, files: FileSet, columns: Columns) -> None:
        if not files.files:
            raise InputError(f"{name} holds no {format_.value} files.")
        self.name, self.format = name, format_
        self._files = files
        self.n_files = len(files.files)
        with self._opened(0) as table:
            self.columns = chosen_columns(columns, list(table.schema.names), where=files.files[0].path)
            self.id_type = _id_type(table.schema, self.columns.id)
        self.modality = modality_of(self.columns)
        self._counts: dict[int, int] = {}

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return digest_of_files(self._files.files, map(self._files.relative, self._files.files))

    def n_rows(self, file: int) -> int:
        """Return the rows of a file, from its footer or batches."""
        if file not in self._counts:
            with self._opened(file) as table:
                self._counts[file] = table.n_rows()
        return self._counts[file]

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield the rows of a file, skipping those that are not needed."""
        path = self._files.files[file].path
        columns = self.columns
        item = columns.text if columns.text is not None else columns.image
        wanted = [name for name in dict.fromkeys((columns.id, item, columns.language)) if name is not None]
        size = PIECE_TEXTS if self.modality is Modality.TEXT else PIECE_IMAGES
        cells = Cells(columns, self.id_type, self._files.filesystem, path.rsplit("/", 1)[0])
        with self._opened(file) as table:
            if missing := [name for name in wanted if name not in table.schema.names]:
                raise InputError(f"{path} has no column {missing[0]!r}; it has {list(table.schema.names)}.")
            for start, batch in table.batches(wanted, size, needs):
                yield cells.rows(
                    start,
                    None if columns.id is None else batch.column(columns.id).to_pylist(),
                    batch.column(item).to_pylist(),
                    None if columns.language is None else batch.column(columns.language).to_pylist(),
                )

    def opened(self, file: int) -> contextlib.AbstractContextManager[_ParquetTable | _ArrowTable]:
        """Open a file, to read columns of it by row numbers."""
        return self._opened(file)

    @contextlib.contextmanager
    def _opened(self, file: int) -> Iterator[_ParquetTable | _ArrowTable]:
        import pyarrow

        opened = self._files.files[file]
        kind = _ParquetTable if self.format is SourceFormat.PARQUET else _ArrowTable
        try:
            with contextlib.closing(kind(self._files.filesystem, opened.path)) as table:
                yield table
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"{opened.path} cannot be read as {self.format.value} ({error}). "
                "Restore it if it is truncated or damaged."
            ) from error


class _ParquetTable:
    def __init__(self, filesystem: Any, path: str) -> None:
        import pyarrow.parquet

        # larger buffers would be kept per column for each of thousands of row groups
        self._file = pyarrow.parquet.ParquetFile(
            filesystem.open_input_file(path), buffer_size=1 << 20, pre_buffer=False
        )
        self.schema = self._file.schema_arrow

    def n_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Sequence[str], size: int, needs: Needs) -> Iterator[tuple[int, Any]]:
        row = 0
        for group in range(self._file.num_row_groups):
            n_rows = self._file.metadata.row_group(group).num_rows
            if needs(row, row + n_rows):
                at = row
                for batch in self._file.iter_batches(
                    size, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield at, batch
                    at += batch.num_rows
            row += n_rows

    def close(self) -> None:
        self._file.close(force=True)


class _ArrowTable:
    """Arrow file or stream; Feather (version 2) is an Arrow file."""

    def __init__(self, filesystem: Any, path: str) -> None:
        import pyarrow

        self._opened = _mapped_or_opened(filesystem, path)
        self._file: Any = None
        try:
            self._file = pyarrow.ipc.open_file(self._opened)
            self.schema = self._file.schema
        except pyarrow.ArrowInvalid:
            self._opened.seek(0)
            self._stream = pyarrow.ipc.open_stream(self._opened)
            self.schema = self._stream.schema

    def n_rows(self) -> int:
        return sum(batch.num_rows for batch in self._record_batches())

    def batches(self, columns: Sequence[str], size: int, needs: Needs) -> Iterator[tuple[int, Any]]:
        row = 0
        for batch in self._record_batches():
            for start in range(0, batch.num_rows, size):
                stop = min(start + size, batch.num_rows)
                if needs(row + start, row + stop):
                    yield row + start, batch.select(list(columns)).slice(start, stop - start)
            row += batch.num_rows

    def _record_batches(self) -> Iterator[Any]:
        if self._file is None:
            yield from self._stream
        else:
            for number in range(self._file.num_record_batches):
                yield self._file.get_batch(number)

    def close(self) -> None:
        self._opened.close()


def _mapped_or_opened(filesystem: Any, path: str) -> Any:
    import pyarrow
    import pyarrow.fs

    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return pyarrow.memory_map(path)
    return filesystem.open_input_file(path)


def _id_type(schema: Any, column: str | None) -> IdType:
    import pyarrow

    if column is None:
        return IdType.INT64
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if pyarrow.types.is_integer(kind):
        return IdType.INT64
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or kind == pyarrow.string_view():
        return IdType.STRING
    raise InputError(f"The id column {column!r} is of type {kind}; expected strings or integers.")


def files_of_dataset(name: str, files: FileSet) -> FileSet:
    """Return the Arrow files of a dataset written by ``datasets.save_to_disk``, in dataset order.

    Raises:
        InputError: the dataset has several splits, or files are missing.
    """
    by_name = {files.relative(file): file for file in files.files}
    prefix = ""
    if "dataset_dict.json" in by_name:
        splits = json.loads(_text(files, by_name["dataset_dict.json"]))["splits"]
        if len(splits) != 1:
            raise InputError(f"{name} has splits {splits}; pass one of them, e.g. {name}/{splits[0]}.")
        prefix = f"{splits[0]}/"
    if f"{prefix}state.json" not in by_name:
        raise InputError(f"{name} has no {prefix}state.json, so it is not a dataset saved to disk.")
    state = json.loads(_text(files, by_name[f"{prefix}state.json"]))
    wanted = [prefix + entry["filename"] for entry in state["_data_files"]]
    if missing := [entry for entry in wanted if entry not in by_name]:
        raise InputError(f"{name} lacks {missing[0]}, which its state.json lists. Copy the dataset again.")
    return FileSet(files.filesystem, files.root, tuple(by_name[entry] for entry in wanted), True)


def _text(files: FileSet, file: File) -> str:
    with files.filesystem.open_input_file(file.path) as opened:
        return str(opened.read(), "utf-8")
