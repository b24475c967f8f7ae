"""Tables in memory as rows: mappings of columns, frames of pandas and polars, Arrow's tables, datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from PIL import Image

from runtime.corpus.sources.base import PIECE_TEXTS
from runtime.errors import InputError

__all__ = ["StreamRows", "TableRows", "items_from_object"]


class StreamRows:
    """Rows of a table that is read once, as mappings.

    Attributes:
        names: Columns of the table, of which a mapping would hide the second of a name.
    """

    def __init__(self, names: Sequence[Any], rows: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
        self.names, self._rows = names, rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self._rows()


class TableRows(StreamRows):
    """Rows of a table in memory, as mappings; they can be iterated over again."""

    def __init__(
        self, n_rows: int | None, names: Sequence[Any], rows: Callable[[], Iterator[Mapping[str, Any]]]
    ) -> None:
        super().__init__(names, rows)
        self.n_rows = n_rows


def items_from_object(source: Any) -> Iterable[Any]:
    """Return the items of a Python object: the rows of a table, otherwise the object itself.

    Raises:
        InputError: it is neither a table nor an iterable of several items, or its columns do not fit.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        raise InputError(f"The source is {type(source).__name__}; pass a path, or a list of images.")
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim in (0, 2, 3)):
        raise InputError("The source is a single image; pass a list of images.")
    if isinstance(source, Mapping):
        return _rows_of_mapping(source)
    if hasattr(source, "collect_schema") and not hasattr(
        source, "iter_rows"
    ):  # its columns warn of their cost
        raise InputError(
            f"The source is a {type(source).__name__}, a query that has not run. Pass its result: "
            "source.collect(), or a file written by source.sink_parquet(…)."
        )
    if hasattr(source, "with_format") and hasattr(source, "features") and isinstance(source, Sized):
        return _rows_of_dataset(source)
    if hasattr(source, "iter_rows") and not hasattr(source, "fetchall"):  # polars, and no relation of DuckDB
        return TableRows(_length(source), source.columns, lambda: iter(source.iter_rows(named=True)))
    if hasattr(source, "itertuples"):  # pandas
        return TableRows(len(source), list(source.columns), lambda: _rows_of_frame(source))
    if hasattr(source, "schema") and hasattr(source, "to_pylist"):
        return TableRows(source.num_rows, source.schema.names, lambda: _rows_of_arrow(source))
    if hasattr(source, "schema") and hasattr(source, "read_next_batch"):
        return StreamRows(source.schema.names, lambda: _rows_of_arrow(source))
    if hasattr(source, "to_pylist"):
        return _values_of(source)
    if hasattr(source, "columns") and hasattr(
        source, "__arrow_c_stream__"
    ):  # a relation of DuckDB, among others
        import pyarrow

        reader = pyarrow.RecordBatchReader.from_stream(source)
        return StreamRows(reader.schema.names, lambda: _rows_of_arrow(reader))
    if hasattr(source, "columns") or not isinstance(source, Iterable):
        raise InputError(
            f"The source is of type {type(source).__name__}; expected a path, folder, glob or URL, a table "
            "(a mapping of columns, a data frame of pandas or polars, a table of Arrow), or an iterable of "
            "texts, images or mappings."
        )
    return source


def _length(source: Any) -> int | None:
    return len(source) if isinstance(source, Sized) else None


def _rows_of_mapping(columns: Mapping[str, Any]) -> Iterable[Any]:
    if columns and all(hasattr(column, "features") for column in columns.values()):  # a DatasetDict
        if len(columns) > 1:
            raise InputError(
                f"The source is a {type(columns).__name__} of the splits {list(columns)}; pass one of them, "
                f"such as source[{next(iter(columns))!r}]."
            )
        return items_from_object(next(iter(columns.values())))
    for name, column in columns.items():
        if isinstance(column, (str, bytes, Mapping)) or not isinstance(column, Sized):
            raise InputError(
                f"Column {name!r} of the source is of type {type(column).__name__}; expected a list with a "
                "cell per row. For one row, or rows one by one, pass a list of mappings."
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"The columns of the source have different lengths: {lengths}.")
    names = list(columns)
    return TableRows(
        next(iter(lengths.values()), 0),
        names,
        lambda: (
            dict(zip(names, row, strict=True)) for row in zip(*map(_values_of, columns.values()), strict=True)
        ),
    )


def _rows_of_dataset(dataset: Any) -> Iterable[Any]:
    """Return the rows of a ``datasets.Dataset``: images as their files, unless it has a transform of its "
    "own."""
    form = dict(getattr(dataset, "format", None) or {})
    if form.get("type") == "custom":
        return TableRows(len(dataset), dataset.column_names, lambda: iter(dataset))

    def rows() -> Iterator[Mapping[str, Any]]:
        arrow = dataset.with_format("arrow", columns=form.get("columns"))
        for table in arrow.iter(batch_size=1_000):
            yield from table.to_pylist()

    return TableRows(len(dataset), form.get("columns") or dataset.column_names, rows)


def _values_of(column: Any) -> Iterable[Any]:
    """Return the cells of a column as Python's own values."""
    if hasattr(column, "to_pylist"):
        return list(column.to_pylist())
    is_flat = hasattr(column, "tolist") and getattr(column, "ndim", 1) == 1
    return list(column.tolist()) if is_flat else list(column)


def _rows_of_frame(frame: Any) -> Iterator[Mapping[str, Any]]:
    names = list(frame.columns)
    for start in range(0, len(frame), PIECE_TEXTS):
        part = frame.iloc[start : start + PIECE_TEXTS]
        columns = [part.iloc[:, number].tolist() for number in range(len(names))]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _rows_of_arrow(table: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(table, "read_next_batch"):
        batches = iter(table)
    else:
        batches = iter(
            table.to_batches(max_chunksize=PIECE_TEXTS) if hasattr(table, "to_batches") else [table]
        )
    for batch in batches:
        yield from batch.to_pylist()
