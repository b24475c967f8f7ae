"""Python's own iterables as a source: strings, images, or mappings with columns."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.batching import windows
from runtime.corpus.rows import Columns, IdType, ImageFile, Item, Needs, Problem, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, PIECE_TEXTS, SourceFormat, chosen_columns
from runtime.corpus.sources.records import Cells, modality_of
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = ["ItemSource"]


class ItemSource:
    """Items of an iterable, read once, in order.

    A string is a text; bytes, a path, a Pillow image or an array is an image (with ``columns.image`` set,
    a string is an image's path). A mapping has columns.

    Raises:
        InputError: nothing to read, or columns that are missing or unclear.
    """

    def __init__(self, items: Iterable[Any], columns: Columns) -> None:
        iterator = iter(items)
        first = next(iterator, None)
        if first is None:
            raise InputError("There is nothing to embed: the source is empty, or starts with None.")
        self._items = itertools.chain([first], iterator)
        self.name, self.format, self.n_files = type(items).__name__, SourceFormat.ITEMS, 1
        self.id_type = IdType.INT64
        if isinstance(first, Mapping):
            self.columns = chosen_columns(columns, list(first), where="The first item")
            if self.columns.id is not None and not isinstance(first[self.columns.id], int):
                self.id_type = IdType.STRING
        elif columns.image is None and isinstance(first, str):
            self.columns = Columns(text="text")
        else:
            self.columns = Columns(image="image")
        self.modality = modality_of(self.columns)
        self._are_mappings = isinstance(first, Mapping)

    def identity(self) -> str:
        """The same for every iterable: its content cannot be known before it is read."""
        return "items"

    def n_rows(self, file: int) -> None:
        """Unknown until the iterable ends."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """All items; a second reading finds none left."""
        start = 0
        is_text = self.modality is Modality.TEXT
        for items in windows(self._items, PIECE_TEXTS if is_text else PIECE_IMAGES):
            yield self._rows(start, items)
            start += len(items)

    def _rows(self, start: int, items: list[Any]) -> Rows:
        columns = self.columns
        name = columns.text or columns.image or ""
        values, ids, codes = items, None, None
        if self._are_mappings:
            records = [item if isinstance(item, Mapping) else {} for item in items]
            values = [record.get(name) for record in records]
            ids = None if columns.id is None else [record.get(columns.id) for record in records]
            codes = None if columns.language is None else [record.get(columns.language) for record in records]
        local: Any = None
        if self.modality is Modality.IMAGE:
            import pyarrow.fs

            local = pyarrow.fs.LocalFileSystem()
            values = [_image(value, local) for value in values]
            objects = {i: value for i, value in enumerate(values) if not isinstance(value, (bytes, Problem))}
            values = [b"" if i in objects else value for i, value in enumerate(values)]
            rows = Cells(columns, self.id_type, local, "").rows(start, ids, values, codes)
            checked: list[Item] = [objects.get(i, item) for i, item in enumerate(rows.items)]
            return Rows(start, rows.ids, checked, rows.languages)
        return Cells(columns, self.id_type, local, "").rows(start, ids, values, codes)


def _image(value: Any, local: Any) -> Item:
    if isinstance(value, (str, os.PathLike)):
        return ImageFile(local, str(Path(value).absolute()))
    if value is None:
        return Problem("null-image", "The image is null.")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (bytes, Image.Image)) or hasattr(value, "__array_interface__"):
        return value
    return Problem("not-image", f"The image is of type {type(value).__name__}.")
