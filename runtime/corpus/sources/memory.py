"""Tables in memory as rows: columns in a mapping, data frames of pandas and polars, Arrow's tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from PIL import Image

from runtime.corpus.sources.base import PIECE_TEXTS
from runtime.errors import InputError

__all__ = ["items_from_object"]


def items_from_object(source: Any) -> Iterable[Any]:
    """Return the items of a Python object: the rows of a table as mappings, otherwise the object itself.

    Raises:
        InputError: it is neither a table nor an iterable of several items, or its columns do not fit.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        raise InputError(f"The source is {type(source).__name__}; pass a path, or a list of images.")
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim in (0, 2, 3)):
        raise InputError("The source is a single image; pass a list of images.")
    if isinstance(source, Mapping):
        return _rows_of_mapping(source)
    if hasattr(source, "iter_rows"):  # polars
        rows: Iterable[Any] = source.iter_rows(named=True)
        return rows
    if hasattr(source, "itertuples"):  # pandas
        return _rows_of_frame(source)
    if hasattr(source, "schema") and (hasattr(source, "to_pylist") or hasattr(source, "read_next_batch")):
        return _rows_of_arrow(source)
    if hasattr(source, "to_pylist"):
        return _values_of(source)
    if hasattr(source, "columns") or not isinstance(source, Iterable):
        raise InputError(
            f"The source is of type {type(source).__name__}; expected a path, folder, glob or URL, a table "
            "(a mapping of columns, a data frame of pandas or polars, a table of Arrow), or an iterable of "
            "texts, images or mappings."
        )
    return source


def _rows_of_mapping(columns: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
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
    return (
        dict(zip(names, row, strict=True)) for row in zip(*map(_values_of, columns.values()), strict=True)
    )


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
