"""Python iterables as a source: strings, images, or mappings with columns."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtime.corpus.faults import Patience
from runtime.corpus.files import FileSet
from runtime.corpus.rows import Columns, IdType, ImageFile, Item, Needs, Problem, Rows
from runtime.corpus.sources.base import (
    PIECE_IMAGES,
    PIECE_TEXTS,
    BadFile,
    CaptionUse,
    Reading,
    SourceFormat,
    bounded_pieces,
    chosen_columns,
    modality_of,
)
from runtime.corpus.sources.cells import are_int64, image_from_cell, value_at
from runtime.corpus.sources.memory import StreamRows, TableRows
from runtime.corpus.sources.records import Cells
from runtime.errors import ImageError, InputError
from runtime.manifest import Modality
from runtime.preprocessing.image import Snapshot, snapshot_from_source

__all__ = ["ItemSource"]


class _Cell(NamedTuple):
    value: Any
    id: Any = None
    language: Any = None


class ItemSource:
    """Items of an iterable, read once and in order.

    A string is a text, or an image's path if ``columns.image`` is set. Bytes, a path, a Pillow image or an
    array is an image. A mapping has columns.

    Raises:
        InputError: the iterable is empty, or columns are missing or ambiguous.
    """

    def __init__(
        self,
        items: Iterable[Any],
        columns: Columns,
        reading: Reading | None = None,
        *,
        name: str | None = None,
    ) -> None:
        reading = reading or Reading()
        self._table = items if isinstance(items, TableRows) else None
        iterator = iter(items)
        first = next(iterator, None)
        if first is None:
            raise InputError("There is nothing to embed: the source is empty, or starts with None.")
        self._items = itertools.chain([first], iterator)
        self.name, self.format, self.n_files = type(items).__name__, SourceFormat.ITEMS, 1
        self.files, self.patience = FileSet((), False), Patience(reading.patience_s)
        self.bad_files: list[BadFile] = []
        self.notes: list[str] = []
        self.stream_name = name
        self.id_type = IdType.INT64
        if _is_row_without_names(first):
            raise InputError(
                f"The first item is a {type(first).__name__}; expected a text, an image or a mapping of "
                "columns. Pass a data frame itself, or its rows as mappings: frame.to_dict('records')."
            )
        if hasattr(first, "collect_schema") or hasattr(first, "columns") or hasattr(first, "schema"):
            raise InputError(
                f"The first item is of type {type(first).__name__}, a table; expected a text, an image or a "
                "mapping. Pass one table, or its rows as mappings."
            )
        self._captions = reading.captions
        if isinstance(first, Mapping):
            known = items.names if isinstance(items, StreamRows) else first
            names = [name for name in known if isinstance(name, str)]
            self.columns = chosen_columns(columns, {"The first item": names})
            self.id_type = self._id_type(first, reading)
        elif columns.image is None and isinstance(first, str):
            self.columns = Columns(text="text")
        else:
            self.columns = Columns(image="image")
        self.modality = modality_of(self.columns)
        self._are_mappings = isinstance(first, Mapping)
        self._local: Any = None
        if self.modality is Modality.IMAGE:
            import pyarrow.fs

            self._local = pyarrow.fs.LocalFileSystem()

    def _id_type(self, first: Mapping[str, Any], reading: Reading) -> IdType:
        """Return the storage type of ids: told by all rows of a table, by the first item of an iterable."""
        column = self.columns.id
        if column is None:
            return IdType.INT64
        if reading.captions is CaptionUse.EACH:
            return IdType.STRING
        if reading.id_type is not None:
            return reading.id_type
        records: Iterable[Mapping[str, Any]] = [first] if self._table is None else self._table
        known = (v for record in records if (v := _plain(value_at(record, column))) is not None)
        return IdType.INT64 if are_int64(known) else IdType.STRING

    @property
    def is_read_once(self) -> bool:
        """True for an iterable, False for a table."""
        return self._table is None

    def identity(self) -> str:
        """Return the given name; of a table of texts without one, a hash of its content; else a constant."""
        if self.stream_name is not None:
            return f"items {self.stream_name}"
        if self._table is None or self.modality is Modality.IMAGE:
            return "items"
        wanted = [name for name in (self.columns.id, self.columns.text, self.columns.language) if name]
        digest = hashlib.blake2b(digest_size=8)
        for record in self._table:
            digest.update(repr([value_at(record, name) for name in wanted]).encode("utf-8", "surrogatepass"))
        return f"table {digest.hexdigest()}"

    def n_rows(self, file: int) -> int | None:
        """Return the rows of a table; ``None`` for an iterable, whose number is unknown until it ends."""
        return None if self._table is None or self._captions is CaptionUse.EACH else self._table.n_rows

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield all items as rows; of an iterable, a second call yields none."""
        start = 0
        is_text = self.modality is Modality.TEXT
        most = PIECE_TEXTS if is_text else PIECE_IMAGES
        for cells in bounded_pieces(self._cells(), most, _size):
            rows = self._rows(start, cells)
            yield rows
            start = rows.stop

    def _cells(self) -> Iterator[_Cell]:
        """Yield each item's cells, copied before requesting the next item, when the caller may change it."""
        columns = self.columns
        for number, item in enumerate(self._items if self._table is None else self._table):
            cell = _Cell(_plain(item))
            if self._are_mappings:
                record = item if isinstance(item, Mapping) else {}
                wanted = (columns.text or columns.image, columns.id, columns.language)
                cell = _Cell(*(None if name is None else _plain(value_at(record, name)) for name in wanted))
            if self.modality is Modality.IMAGE:
                cell = cell._replace(value=_image(cell.value, number, self._local))
            yield cell

    def _rows(self, start: int, cells: list[_Cell]) -> Rows:
        columns = self.columns
        values = [cell.value for cell in cells]
        ids = [cell.id for cell in cells] if self._are_mappings and columns.id is not None else None
        codes = [cell.language for cell in cells] if self._are_mappings and columns.language else None
        taken = {i: value for i, value in enumerate(values) if isinstance(value, (ImageFile, Snapshot))}
        values = [b"" if i in taken else value for i, value in enumerate(values)]
        rows = Cells(columns, self.id_type, self._local, "", self._captions).rows(start, ids, values, codes)
        checked: list[Item] = [
            item if isinstance(item, Problem) else taken.get(i, item) for i, item in enumerate(rows.items)
        ]
        return Rows(start, rows.ids, checked, rows.languages)


def _plain(value: Any) -> Any:
    """Return a scalar of NumPy as Python's own, other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _is_row_without_names(item: Any) -> bool:
    """Check for a tuple, as of ``itertuples`` or ``iterrows``, and for a row of pandas on its own."""
    is_series = hasattr(item, "to_dict") and hasattr(item, "index") and not isinstance(item, (str, Mapping))
    return isinstance(item, (tuple, list)) or (is_series and not hasattr(item, "columns"))


def _size(cell: _Cell) -> int:
    return len(cell.value) if isinstance(cell.value, (str, bytes)) else 64


def _image(value: Any, number: int, local: Any) -> Item:
    if isinstance(value, Mapping):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if isinstance(value, str) and ("://" in value or value.startswith("data:") or not value):
        return image_from_cell(value, local, "")
    if isinstance(value, (str, os.PathLike)):
        return ImageFile(local, str(Path(value).absolute()))
    if value is None:
        return Problem("null-image", "The image is null.")
    if isinstance(value, bytes):
        return value
    known = isinstance(value, (Image.Image, bytearray, memoryview))  # hasattr would decode an image
    if not known and not hasattr(value, "__array_interface__"):
        return Problem("not-image", f"The image is of type {type(value).__name__}.")
    try:
        taken = snapshot_from_source(value, name=f"of row {number}")
    except ImageError as error:
        return Problem("corrupt-image", str(error))
    return taken.content if isinstance(taken.content, bytes) else taken
