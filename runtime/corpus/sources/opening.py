"""Opening of a source by its suffix, folder content or given format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from runtime.corpus.faults import Patience, without_query
from runtime.corpus.files import File, FileSet, files_from_locations
from runtime.corpus.locations import COMPRESSED, COMPRESSED_TARS, suffix_of
from runtime.corpus.rows import Columns
from runtime.corpus.sources.base import Reading, Source, SourceFormat
from runtime.corpus.sources.folders import FolderSource
from runtime.corpus.sources.items import ItemSource
from runtime.corpus.sources.lines import LineSource
from runtime.corpus.sources.memory import items_from_object
from runtime.corpus.sources.stdin import STANDARD_INPUT, files_of_standard_input
from runtime.corpus.sources.tables import TableSource, files_of_dataset
from runtime.corpus.sources.tars import TarSource
from runtime.errors import InputError
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, RAW_SUFFIXES

__all__ = ["Locations", "open_source", "source_format"]

_SUFFIXES = {
    ".parquet": SourceFormat.PARQUET,
    ".pq": SourceFormat.PARQUET,
    ".arrow": SourceFormat.ARROW,
    ".feather": SourceFormat.ARROW,
    ".ipc": SourceFormat.ARROW,
    ".csv": SourceFormat.CSV,
    ".tsv": SourceFormat.CSV,
    ".tab": SourceFormat.CSV,
    ".jsonl": SourceFormat.JSONL,
    ".ndjson": SourceFormat.JSONL,
    ".txt": SourceFormat.TEXT,
    ".tar": SourceFormat.WEBDATASET,
    **dict.fromkeys(COMPRESSED_TARS, SourceFormat.WEBDATASET),
    **dict.fromkeys(IMAGE_SUFFIXES, SourceFormat.IMAGES),
}
_DATASET_FILES = ("dataset_dict.json", "state.json")
_OTHER_IMAGES = OTHER_IMAGE_SUFFIXES | RAW_SUFFIXES
_MOST_SUFFIXES = 12
_TABLES = (SourceFormat.PARQUET, SourceFormat.ARROW, SourceFormat.CSV, SourceFormat.JSONL)


class Locations(tuple[str, ...]):
    """Several paths, folders, patterns or URLs that together are one source, in this order."""

    __slots__ = ()


def open_source(
    source: str | os.PathLike[str] | Locations | Iterable[Any],
    *,
    columns: Columns | None = None,
    format: SourceFormat | str | None = None,
    reading: Reading | None = None,
    name: str | None = None,
    exclude: str | os.PathLike[str] | None = None,
) -> Source:
    """Open a corpus, looking at the footers, headers or beginnings of all its files.

    Args:
        source: A path, folder, glob or URL, ``-`` for standard input, or ``Locations`` of several; a table
            in memory: a mapping of columns, a data frame of pandas or polars, a table of Arrow, a dataset
            of ``datasets``; or an iterable of texts, images or mappings.
        columns: Columns of ids, texts, images and languages; default: their usual names.
        format: Storage format; default: inferred from suffixes.
        reading: Delimiter, encoding and other options of reading.
        name: Name of an iterable or of standard input, by which a run into the same folder is resumed.
        exclude: Folder that is not listed: the output's.

    Raises:
        InputError: the source is missing, its format is unknown or mixed, or its columns are ambiguous.
        DamagedFileError: a file is cut off or damaged.
        InputFaultError: storage did not answer in time.
    """
    columns, reading = columns or Columns(), reading or Reading()
    if not isinstance(source, (str, os.PathLike, Locations)):
        return ItemSource(items_from_object(source), columns, reading, name=name)
    locations = list(source) if isinstance(source, Locations) else [os.fspath(source)]
    if not locations:
        raise InputError("There is no source: pass a path, folder, glob or URL.")
    shown = ", ".join(map(without_query, locations))
    if STANDARD_INPUT in locations:
        return _of_standard_input(locations, columns, format, reading, name)
    files = files_from_locations(
        locations,
        exclude=None if exclude is None else os.fspath(exclude),
        patience=Patience(reading.patience_s),
    )
    chosen = _format(shown, files) if format is None else source_format(format)
    match chosen:
        case SourceFormat.DATASETS:
            return TableSource(shown, SourceFormat.ARROW, files_of_dataset(shown, files), columns, reading)
        case SourceFormat.IMAGES:
            return FolderSource(shown, _of_format(files, chosen), columns, reading)
        case SourceFormat.WEBDATASET:
            return TarSource(shown, _of_format(files, chosen), columns, reading)
        case SourceFormat.PARQUET | SourceFormat.ARROW:
            return TableSource(shown, chosen, _of_format(files, chosen), columns, reading)
        case _:
            return LineSource(shown, chosen, _of_format(files, chosen), columns, reading)


def _of_standard_input(
    locations: Sequence[str],
    columns: Columns,
    format: SourceFormat | str | None,
    reading: Reading,
    name: str | None,
) -> Source:
    """Open standard input, which is read once and in order."""
    kinds = (SourceFormat.TEXT, SourceFormat.CSV, SourceFormat.JSONL, SourceFormat.WEBDATASET)
    chosen = None if format is None else source_format(format)
    if len(locations) > 1 or chosen is None or chosen not in kinds:
        raise InputError(
            "Standard input (-) is a source of its own, and its format must be given: pass --format with one "
            f"of {[kind.value for kind in kinds]}."
        )
    files = files_of_standard_input(name)
    if chosen is SourceFormat.WEBDATASET:
        return TarSource(STANDARD_INPUT, files, columns, reading)
    return LineSource(STANDARD_INPUT, chosen, files, columns, reading)


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
    if files.is_folder and {file.name for file in files.files} & set(_DATASET_FILES):
        return SourceFormat.DATASETS
    found = {kind for file in files.files if (kind := _format_of(file.path)) is not None}
    found |= {kind for path in files.misnamed if (kind := _format_of(path)) is not None}
    if len(found) > 1:
        raise InputError(
            f"{name} holds files of several formats: {sorted(kind.value for kind in found)}. Pass a pattern "
            "such as 'FOLDER/*.parquet', or choose one with --format."
        )
    if not files.files:
        raise InputError(f"{name} is a folder without any file, apart from hidden ones.")
    if not found and any(file.suffix in _OTHER_IMAGES for file in files.files):
        return SourceFormat.IMAGES
    if not found and any(file.suffix == ".json" for file in files.files):
        raise InputError(
            f"{name} has the suffix .json. If it holds one object a line, pass --format jsonl. An array or a "
            "document, such as COCO's, is to be converted: jq -c '.[]' FILE > FILE.jsonl, or jq -c "
            "'.annotations[]' FILE > FILE.jsonl"
        )
    if not found:
        raise InputError(
            f"{name} has no known suffix; expected one of {', '.join(sorted(_SUFFIXES))}, also followed by "
            f"{', '.join(COMPRESSED)}. Choose the format with --format."
        )
    return found.pop()


def _format_of(path: str) -> SourceFormat | None:
    return _SUFFIXES.get(suffix_of(path))


def _of_format(files: FileSet, format: SourceFormat) -> FileSet:
    """Keep a folder's files of the format; files named directly are all kept.

    Below a folder of tables, names with ``_`` in front are Spark's and other writers' own. Without any file
    of the format's suffixes, files of unknown suffixes are taken for it.
    """
    if not files.is_folder:
        return files
    taken = {suffix for suffix, kind in _SUFFIXES.items() if kind is format}
    if format is SourceFormat.IMAGES:  # pictures of other formats are rows as well, mostly bad ones
        taken |= _OTHER_IMAGES
    kept = [file for file in files.files if file.suffix in taken]
    if not kept and format is SourceFormat.JSONL:
        kept = [file for file in files.files if file.suffix == ".json"]
    if not kept:
        kept = [file for file in files.files if _format_of(file.path) is None]
        suffixes = sorted({file.suffix for file in kept})
        if len(suffixes) > 1:
            raise InputError(
                f"No file has a suffix of {format.value}, and the others have the suffixes {suffixes}. Pass "
                "a pattern, such as 'FOLDER/*.dat'."
            )
    taken |= {file.suffix for file in kept}
    others = [file for file in files.files if file.suffix not in taken]
    notes = []
    if format in _TABLES:
        own = [file for file in kept if _is_writers_own(file)]
        if own and len(own) < len(kept):
            notes.append(f"{len(own)} files below names with _ in front were left out, such as {own[0].name}")
            kept = [file for file in kept if not _is_writers_own(file)]
    if others:
        found = ", ".join(sorted({file.suffix or "none" for file in others})[:_MOST_SUFFIXES])
        notes.append(
            f"{len(others)} files of other formats were left out, such as {others[0].name} (suffixes: "
            f"{found})"
        )
    misnamed = tuple(name for name in files.misnamed if suffix_of(name) in taken)
    return replace(files.kept(kept, *notes), misnamed=misnamed)


def _is_writers_own(file: File) -> bool:
    return any(part.startswith("_") and "=" not in part for part in file.name.split("/"))
