"""Outlook on a run before any work: files, columns, rows, and an estimate of time and size."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice

from runtime.corpus.engines import choice_from_arguments, open_encoder
from runtime.corpus.job import images_per_slice, preparation_for, slices_of_rows, source_of_run
from runtime.corpus.locations import compression_of
from runtime.corpus.options import Options
from runtime.corpus.rows import Rows
from runtime.corpus.sources import Locations, NumberedRows, Source, SourceFormat
from runtime.embeddings import Encoding
from runtime.encoder import Encoder
from runtime.manifest import model_location

__all__ = ["lines_of_outlook"]

_TRIED_ROWS = 256
_COUNTED_ROWS = 100_000
"""Rows of files without a footer that are read to tell how many there are."""

_BYTES = {Encoding.FLOAT32: 4.0, Encoding.FLOAT16: 2.0, Encoding.INT8: 1.0, Encoding.BINARY: 1 / 8}
_SHOWN_FILES = 5


def lines_of_outlook(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str] | Locations,
    out: str | os.PathLike[str],
    options: Options,
) -> Iterator[str]:
    """Yield what a run would do, in lines; nothing is written.

    Raises:
        InputError, EngineError, …: as the run would.
    """
    opened = source_of_run(source, options, os.fspath(out))
    yield from _lines_of_files(opened)
    yield from _lines_of_columns(opened, options)
    n_rows, how = _rows_of(opened)
    shown = "unknown until it is read" if n_rows is None else f"{how}{n_rows:,}"
    yield f"rows      {shown}"
    for note in opened.notes:
        yield f"note      {note}"
    for bad in opened.bad_files:
        yield f"set aside {bad.name}: {bad.reason}"
    with _opened(model, opened, options) as encoder:
        width = encoder.require_width(options.dim)
        rate, n_bad, n_tried = _rate(encoder, opened, options)
    if n_tried:
        yield f"tried     {n_tried} rows, {n_bad} of them bad; {rate:,.1f} rows/s here"
    if n_rows is not None:
        n_bytes = n_rows * width * _BYTES[options.encoding]
        n_parts = -(-n_rows // options.rows_per_part)
        kind = options.encoding.value
        yield f"output    {n_parts:,} parts, about {n_bytes / 1e6:,.1f} MB of {kind} vectors"
        if rate:
            yield f"time      about {n_rows / rate:,.0f} s on this machine"


def _lines_of_files(source: Source) -> Iterator[str]:
    files = source.files.files
    known = [file.n_bytes for file in files if file.n_bytes is not None]
    size = f", {sum(known) / 1e6:,.1f} MB" if len(known) == len(files) else ""
    yield f"source    {source.name}"
    yield f"files     {len(files):,} of {source.format.value}{size}"
    for file in files[:_SHOWN_FILES]:
        yield f"          {file.name}"
    if len(files) > _SHOWN_FILES:
        yield f"          … and {len(files) - _SHOWN_FILES:,} more"


def _lines_of_columns(source: Source, options: Options) -> Iterator[str]:
    columns = source.columns
    if source.format is SourceFormat.IMAGES:
        yield "id        path of the file below the source (string)"
        yield "image     the files"
        return
    given = "given" if options.columns.id else "by its usual name"
    numbers = "row numbers (int64)"
    yield f"id        {numbers if columns.id is None else f'{columns.id} ({source.id_type.value}), {given}'}"
    item, column = ("text", columns.text) if columns.text is not None else ("image", columns.image)
    given = "given" if options.columns.text or options.columns.image else "by its usual name"
    yield f"{item:9} {column}, {given}"
    if columns.text is not None:
        given = "given" if options.columns.language else "by its usual name"
        shown = "none" if columns.language is None else f"column {columns.language}, {given}"
        default = "" if options.language is None else f"; {options.language} where it is left out"
        yield f"language  {shown}{default}"


def _rows_of(source: Source) -> tuple[int | None, str]:
    """Return the number of rows, and ``about`` if it is an estimate; standard input is not read."""
    counts = [source.n_rows(file) for file in range(source.n_files)]
    if all(count is not None for count in counts):
        return sum(count for count in counts if count is not None), ""
    files = source.files.files
    sizes = [file.n_bytes for file in files]
    if not files or None in sizes:
        return None, ""
    n_rows = n_read = 0
    for number in range(source.n_files):
        n_own = 0
        for rows in source.read(number, lambda start, stop: True):
            if n_rows + rows.stop > _COUNTED_ROWS:
                return _estimated(source, n_rows, n_read, rows, number)
            n_own = rows.stop
        n_rows += n_own
        n_read += sizes[number] or 0
    return n_rows, ""


def _estimated(source: Source, n_rows: int, n_read: int, rows: Rows, file: int) -> tuple[int | None, str]:
    total = sum(f.n_bytes or 0 for f in source.files.files)
    if n_read:  # whole files before
        return round(total / n_read * n_rows), "about "
    if compression_of(source.files.files[file].path) is not None:
        return None, ""
    texts = [item for item in rows.items if isinstance(item, (str, bytes))]
    mean = sum(len(t.encode("utf-8", "surrogatepass")) if isinstance(t, str) else len(t) for t in texts)
    return (round(total / (mean / len(texts) + 1)), "about ") if texts else (None, "")


def _opened(model: str | os.PathLike[str], source: Source, options: Options) -> Encoder:
    location = model_location(model)
    if "://" in location:
        from runtime.corpus.remote import open_remote

        return open_remote(location, options.engine)[0]
    choice = choice_from_arguments(
        options.engine, None, model=location, modality=source.modality, cache=options.cache
    )
    return open_encoder(location, choice, options.language, cache=options.cache)


def _rate(encoder: Encoder, source: Source, options: Options) -> tuple[float, int, int]:
    """Embed the first rows: rows a second, bad rows, and rows tried. A source that is read once is not."""
    if source.format is SourceFormat.ITEMS or not all(
        file.n_bytes is not None for file in source.files.files
    ):
        return 0.0, 0, 0
    pieces = islice(iter(NumberedRows(source, lambda start, stop: start < _TRIED_ROWS)), 1)
    first = [rows.cut(rows.start, min(rows.stop, _TRIED_ROWS)) for rows in pieces]
    if not first:
        return 0.0, 0, 0
    preparation = preparation_for(encoder, source.modality, options, patience=source.patience)
    slices = slices_of_rows(
        preparation.shortened(iter(first)),
        source.modality,
        _TRIED_ROWS,
        n_images=images_per_slice(encoder),
    )
    prepared = [preparation.prepared(piece) for piece in preparation.deduplicated(slices)]
    width = encoder.require_width(options.dim)
    batches = [batch for part in prepared for batch in part.batches]
    for batch in batches[:1]:
        batch.run(encoder, width)  # opens the tower
    started = time.perf_counter()
    for batch in batches:
        batch.run(encoder, width)
    seconds = time.perf_counter() - started
    n_tried = sum(len(rows) for rows in first)
    n_bad = sum(len(part.problems) for part in prepared)
    return (n_tried / seconds if batches else 0.0), n_bad, n_tried
