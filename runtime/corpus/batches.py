"""Corpus pipeline for use from Python: batches from an encoder, and a callable for ``map_batches``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.engines import EngineChoice
from runtime.corpus.job import Job, images_per_slice, parts_in_process, preparation_for, slices_of_rows
from runtime.corpus.options import Options
from runtime.corpus.pipeline import EmbeddedPart, PartAssembly, whole_parts
from runtime.corpus.rows import BadRow, Columns
from runtime.corpus.sources import ItemSource, Reading, SourceFormat, open_source
from runtime.counts import require_count, require_threads
from runtime.embeddings import Encoding, encoded_from_float
from runtime.encoder import Encoder
from runtime.errors import InputError
from runtime.local import LocalEncoder
from runtime.manifest import model_location

__all__ = ["BatchEmbedder", "EmbeddedBatch", "embedded_batches"]


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Consecutive rows of a source.

    Attributes:
        ids: One per good row; row numbers if the source has no ids.
        vectors: (good rows, dim) in the requested encoding.
        bad: Rows that could not be embedded, each with its reason.
    """

    ids: list[Any]
    vectors: NDArray[Any]
    bad: list[BadRow]


def embedded_batches(
    encoder: Encoder,
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    columns: Columns | None = None,
    format: SourceFormat | str | None = None,
    reading: Reading | None = None,
    language: str | None = None,
    dim: int | None = None,
    encoding: Encoding | str = Encoding.FLOAT32,
    rows_per_batch: int = 4_096,
    max_batch_tokens: int | None = None,
    runs_at_once: int = 1,
) -> Iterator[EmbeddedBatch]:
    """Embed a corpus lazily: read, prepare and run on threads at the same time; bad rows do not stop it.

    Args:
        encoder: In process or on a server.
        source: A path, folder, glob or URL of a corpus; a table in memory: a mapping of columns, a data frame
            of pandas or polars, a table of Arrow; or an iterable of texts, images or mappings, which is read
            ahead on another thread.
        columns: Names of the columns; the usual names by default.
        format: Storage format of the source; told from suffixes by default.
        reading: Delimiter, encoding and other options of reading the source.
        language: Code of the texts that name none.
        rows_per_batch: Rows of the source in a batch; texts are sorted by length and deduplicated within it.
        max_batch_tokens: Texts × padded length of one run, in tokens; default: 1,024, and 16,384 on a GPU.
        runs_at_once: Threads that run the tower, or requests in flight to a server. Open a local encoder
            with as many ``instances``.

    Yields:
        Ids, vectors and bad rows, in the source's order.

    Raises:
        InputError: the source cannot be read, or the model has no such width.
        InputFaultError: storage failed; batches whose files could not be read are left out.
        EngineError: the tower cannot be opened, or failed.
        ServerError: the server cannot be reached.
    """
    rows_per_batch = require_count(rows_per_batch, "rows_per_batch")
    runs_at_once = require_threads(runs_at_once, "runs_at_once", error=InputError) or 1
    reading = reading or Reading()
    opened = open_source(source, columns=columns, format=format, reading=reading)
    options = Options(
        reading=reading,
        language=language,
        dim=dim,
        rows_per_part=rows_per_batch,
        max_batch_tokens=max_batch_tokens,
    )
    width = encoder.require_width(dim)
    choice = EngineChoice(instances=runs_at_once)
    job = Job(
        encoder.name,
        encoder,
        opened,
        options,
        choice,
        width,
        pending=lambda part: True,
        claim=lambda part: True,
        observe=lambda n_rows, counts: None,
    )
    for part in whole_parts(parts_in_process(job)):
        yield EmbeddedBatch(part.ids, encoded_from_float(part.vectors, encoding), part.bad)


class BatchEmbedder:
    """Callable that embeds batches of columns, for use in a Ray, Daft, Spark or Dask job.

        dataset.map_batches(BatchEmbedder, fn_constructor_kwargs={"model": "models/nllb-clip", "text": "t"})

    A batch is a mapping of arrays, a ``pyarrow.Table`` or ``RecordBatch``, or a pandas ``DataFrame``. The
    same type is returned with two more columns: ``vector`` and ``problem``, which is null for good rows. The
    vector of a bad row is null, or all NaN in a mapping of arrays.

    Args:
        model: ``REPOSITORY/NAME``; opened at the first batch, once per process.
        text: Column of texts; or ``image``, a column of encoded images or paths.
        language: Language code of texts without one; ``language_column`` holds one per row.
        options: Options of ``Encoder.open``: engine, precision, threads, …
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        text: str | None = None,
        image: str | None = None,
        language: str | None = None,
        language_column: str | None = None,
        dim: int | None = None,
        max_batch_tokens: int | None = None,
        **options: Any,
    ) -> None:
        if (text is None) == (image is None):
            raise InputError(f"Pass exactly one column to embed; got text={text!r} and image={image!r}.")
        self._model, self._opening = model_location(model), options
        self._columns = Columns(text=text, image=image, language=language_column)
        self._options = Options(language=language, dim=dim, max_batch_tokens=max_batch_tokens)

    def __call__(self, batch: Any) -> Any:
        """Add the columns ``vector`` and ``problem``."""
        if isinstance(batch, dict):
            part, n_rows = self._embedded({name: _listed(column) for name, column in batch.items()})
            vectors = np.full((n_rows, self._width()), np.nan, dtype=np.float32)
            vectors[np.asarray(part.ids, dtype=np.int64)] = part.vectors
            return {**batch, "vector": vectors, "problem": np.asarray(_problems(part, n_rows), dtype=object)}
        if hasattr(batch, "to_pydict"):
            return self._arrow(batch)
        columns = {name: batch[name].tolist() for name in batch.columns}
        part, n_rows = self._embedded(columns)
        return batch.assign(vector=_nullable(part, n_rows), problem=_problems(part, n_rows))

    def _arrow(self, batch: Any) -> Any:
        import pyarrow

        table = batch if isinstance(batch, pyarrow.Table) else pyarrow.Table.from_batches([batch])
        part, n_rows = self._embedded(
            {n: table[n].to_pylist() for n in self._names() if n in table.schema.names}
        )
        kind = pyarrow.list_(pyarrow.float32(), self._width())
        table = table.append_column("vector", pyarrow.array(_nullable(part, n_rows), kind))
        table = table.append_column("problem", pyarrow.array(_problems(part, n_rows), pyarrow.string()))
        if isinstance(batch, pyarrow.Table):
            return table
        batches = table.combine_chunks().to_batches()
        return batches[0] if batches else pyarrow.RecordBatch.from_pylist([], schema=table.schema)

    def _names(self) -> list[str]:
        columns = self._columns
        return [n for n in (columns.text, columns.image, columns.language) if n is not None]

    def _opened(self) -> LocalEncoder:
        return _encoder_of_process(self._model, tuple(sorted(self._opening.items())))

    def _width(self) -> int:
        return self._opened().require_width(self._options.dim)

    def _embedded(self, columns: dict[str, list[Any]]) -> tuple[EmbeddedPart, int]:
        if missing := [name for name in self._names() if name not in columns]:
            raise InputError(f"The batch has no column {missing[0]!r}; it has {sorted(columns)}.")
        names = self._names()
        n_rows = len(columns[names[0]])
        part = PartAssembly(0, 0, self._width(), n_rows)
        part.end_at(n_rows)
        if n_rows:
            records = [
                dict(zip(names, row, strict=True)) for row in zip(*map(columns.get, names), strict=True)
            ]
            source = ItemSource(records, self._columns)
            preparation = preparation_for(self._opened(), source.modality, self._options)
            rows = preparation.shortened(source.read(0, lambda start, stop: True))
            for piece in preparation.deduplicated(
                slices_of_rows(rows, source.modality, n_rows, n_images=images_per_slice(self._opened()))
            ):
                prepared = preparation.prepared(piece)
                part.add_slice(prepared)
                for batch in prepared.batches:
                    part.add_vectors(batch.rows, batch.counts, batch.run(self._opened(), self._width()))
        return part.finished(has_ids=False), n_rows


@lru_cache(maxsize=2)
def _encoder_of_process(model: str, options: tuple[tuple[str, Any], ...]) -> LocalEncoder:
    """Open a model once per process, however many copies of an embedder its tasks unpickle."""
    return LocalEncoder.from_repository(model, **dict(options))


def _listed(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def _problems(part: EmbeddedPart, n_rows: int) -> list[str | None]:
    problems: list[str | None] = [None] * n_rows
    for row in part.bad:
        problems[row.row] = f"{row.kind}: {row.reason}"
    return problems


def _nullable(part: EmbeddedPart, n_rows: int) -> list[Any]:
    vectors: list[Any] = [None] * n_rows
    for row, vector in zip(part.ids, part.vectors, strict=True):
        vectors[row] = vector
    return vectors
