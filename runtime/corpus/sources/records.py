"""Conversion of the cells of a table, JSON line or tar sample to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.corpus.files import filesystem_from_location
from runtime.corpus.rows import Columns, IdType, ImageFile, Item, Problem, Rows
from runtime.corpus.sources.base import checked_id, checked_language, checked_text
from runtime.manifest import Modality

__all__ = ["Cells", "image_from_cell", "modality_of"]


def modality_of(columns: Columns) -> Modality:
    """Return the modality of the columns: texts if a text column is set, otherwise images."""
    return Modality.TEXT if columns.text is not None else Modality.IMAGE


@dataclass(frozen=True, slots=True)
class Cells:
    """Converter from the cells of one file to rows.

    Attributes:
        filesystem: File system of the paths in the image column.
        folder: Base folder of relative paths.
    """

    columns: Columns
    id_type: IdType
    filesystem: Any
    folder: str

    def rows(
        self,
        start: int,
        ids: Sequence[Any] | None,
        items: Sequence[Any],
        languages: Sequence[Any] | None,
    ) -> Rows:
        """Check every cell; a bad cell makes its row a problem."""
        checked: list[Item]
        if self.columns.text is not None:
            checked = [item if isinstance(item, Problem) else checked_text(item) for item in items]
        else:
            checked = [image_from_cell(item, self.filesystem, self.folder) for item in items]
        kept_ids: list[Any] = [None] * len(checked)
        if ids is not None:
            for i, value in enumerate(ids):
                found = checked_id(value, self.id_type)
                if not isinstance(found, Problem):
                    kept_ids[i] = found
                elif not isinstance(checked[i], Problem):
                    checked[i] = found
        codes: list[Any] | None = None
        if languages is not None:
            codes = [None] * len(checked)
            for i, value in enumerate(languages):
                code = checked_language(value)
                if not isinstance(code, Problem):
                    codes[i] = code
                elif not isinstance(checked[i], Problem):
                    checked[i] = code
        return Rows(start, kept_ids, checked, codes)


def image_from_cell(cell: Any, filesystem: Any, folder: str) -> Item:
    """Return the bytes, or the file to read, of a cell with bytes, a path, or a struct of either."""
    if isinstance(cell, Problem):
        return cell
    if isinstance(cell, Mapping):
        data = cell.get("bytes")
        cell = data if data is not None else cell.get("path")
    if cell is None:
        return Problem("null-image", "The image is null.")
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    if isinstance(cell, str):
        if not cell:
            return Problem("null-image", "The image's path is empty.")
        if "://" in cell:
            return ImageFile(*filesystem_from_location(cell))
        if cell.startswith("/"):
            return ImageFile(filesystem, cell)
        return ImageFile(filesystem, f"{folder}/{cell}")
    return Problem(
        "not-image",
        f"The image is of type {type(cell).__name__}; expected bytes, a path, or a struct of either.",
    )
