"""Opening of a source by its suffix, folder content or given format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from runtime.corpus.files import FileSet, files_from_location
from runtime.corpus.rows import Columns
from runtime.corpus.sources.base import Source, SourceFormat
from runtime.corpus.sources.folders import FolderSource
from runtime.corpus.sources.items import ItemSource
from runtime.corpus.sources.lines import LineSource
from runtime.corpus.sources.memory import items_from_object
from runtime.corpus.sources.tables import TableSource, files_of_dataset
from runtime.corpus.sources.tars import TarSource
from runtime.errors import InputError
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = ["open_source", "source_format"]

_SUFFIXES = {
    ".parquet": SourceFormat.PARQUET,
    ".pq": SourceFormat.PARQUET,
    ".arrow": SourceFormat.ARROW,
    ".feather": SourceFormat.ARROW,
    ".ipc": SourceFormat.ARROW,
    ".csv": SourceFormat.CSV,
    ".tsv": SourceFormat.CSV,
    ".jsonl": SourceFormat.JSONL,
    ".ndjson": SourceFormat.JSONL,
    ".txt": SourceFormat.TEXT,
    ".tar": SourceFormat.WEBDATASET,
    **dict.fromkeys(IMAGE_SUFFIXES, SourceFormat.IMAGES),
}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_DATASET_FILES = ("dataset_dict.json", "state.json")


def open_source(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    columns: Columns | None = None,
    format: SourceFormat | str | None = None,
) -> Source:
    """Open a corpus.

    Args:
        source: A path, folder, glob or URL; a table in memory: a mapping of columns, a data frame of pandas
            or polars, a table of Arrow; or an iterable of texts, images or mappings.
        columns: Columns of ids, texts, images and languages; default: their usual names.
        format: Storage format; default: inferred from suffixes.

    Raises:
        InputError: the source is missing, its format is unknown or mixed, or its columns are ambiguous.
    """
    columns = columns or Columns()
    if not isinstance(source, (str, os.PathLike)):
        return ItemSource(items_from_object(source), columns)
    name = os.fspath(source)
    files = files_from_location(name)
    chosen = _format(name, files) if format is None else source_format(format)
    match chosen:
        case SourceFormat.DATASETS:
            return TableSource(name, SourceFormat.ARROW, files_of_dataset(name, files), columns)
        case SourceFormat.IMAGES:
            return FolderSource(name, _of_format(files, chosen), columns)
        case SourceFormat.WEBDATASET:
            return TarSource(name, _of_format(files, chosen), columns)
        case SourceFormat.PARQUET | SourceFormat.ARROW:
            return TableSource(name, chosen, _of_format(files, chosen), columns)
        case _:
            return LineSource(name, chosen, _of_format(files, chosen), columns)


def source_format(name: SourceFormat | str) -> SourceFormat:
    """Return the format with a name.

    Raises:
        InputError: there is no such format.
    """
    try:
        return SourceFormat(name)
    except ValueError:
        known = [known.value for known in SourceFormat if known is not SourceFormat.ITEMS]
        raise InputError(f"Format {name!r} is unknown; expected one of {known}.") from None


def _format(name: str, files: FileSet) -> SourceFormat:
    if files.is_folder and {files.relative(file) for file in files.files} & set(_DATASET_FILES):
        return SourceFormat.DATASETS
    found = {kind for file in files.files if (kind := _format_of(file.path)) is not None}
    if len(found) > 1:
        raise InputError(
            f"{name} holds files of several formats: {sorted(kind.value for kind in found)}. Pass a pattern "
            "such as 'FOLDER/*.parquet', or choose one with --format."
        )
    if not found:
        raise InputError(
            f"{name} has no known suffix; expected one of {', '.join(sorted(_SUFFIXES))}. Choose the format "
            "with --format."
        )
    return found.pop()


def _format_of(path: str) -> SourceFormat | None:
    suffixes = PurePosixPath(path.lower()).suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _of_format(files: FileSet, format: SourceFormat) -> FileSet:
    """Keep a folder's files of the format; files named directly are all kept."""
    if not files.is_folder:
        return files
    kept = tuple(file for file in files.files if _format_of(file.path) is format)
    return FileSet(files.filesystem, files.root, kept, True)
