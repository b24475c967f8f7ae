"""Conversion of the cells of a table, JSON line or tar sample to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.corpus.rows import Columns, IdType, Item, Problem, Rows
from runtime.corpus.sources.base import CaptionUse
from runtime.corpus.sources.cells import (
    MOST_CHARACTERS,
    checked_id,
    checked_language,
    checked_text,
    image_from_cell,
)

__all__ = ["Cells"]


@dataclass(frozen=True, slots=True)
class Cells:
    """Converter from the cells of one file to rows.

    Attributes:
        filesystem: File system of the paths in the image column.
        folder: Base folder of relative paths.
        captions: Use of lists of texts.
    """

    columns: Columns
    id_type: IdType
    filesystem: Any
    folder: str
    captions: CaptionUse | None = None

    def rows(
        self,
        start: int,
        ids: Sequence[Any] | None,
        items: Sequence[Any],
        languages: Sequence[Any] | None,
    ) -> Rows:
        """Check every cell; a bad cell makes its row a problem. Each caption of a list may become a row."""
        if self.captions is CaptionUse.FIRST:
            items = [_first(item) for item in items]
        elif self.captions is CaptionUse.EACH:
            ids, items, languages = _each(ids, items, languages)
        checked: list[Item]
        if self.columns.text is not None:
            checked = [
                item
                if type(item) is str and len(item) <= MOST_CHARACTERS and item and not item.isspace()
                else _checked_text(item)
                for item in items
            ]
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


def _checked_text(item: Any) -> str | Problem:
    return item if isinstance(item, Problem) else checked_text(item)


def _first(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return item[0] if len(item) else None
    return item


def _each(
    ids: Sequence[Any] | None, items: Sequence[Any], languages: Sequence[Any] | None
) -> tuple[list[Any] | None, list[Any], list[Any] | None]:
    """Make a row of each caption; the k-th of a row with id ``x`` has the id ``x#k``, from 0."""
    new_ids: list[Any] = []
    new_items: list[Any] = []
    new_languages: list[Any] = []
    for i, item in enumerate(items):
        captions = item if isinstance(item, (list, tuple)) else [item]
        captions = captions if len(captions) else [None]
        new_items += captions
        if ids is not None:
            own = checked_id(ids[i], IdType.STRING)
            new_ids += [None if isinstance(own, Problem) else f"{own}#{k}" for k in range(len(captions))]
        if languages is not None:
            code = languages[i]
            is_each = isinstance(code, (list, tuple)) and len(code) == len(captions)
            new_languages += code if is_each else [code] * len(captions)
    return (
        None if ids is None else new_ids,
        new_items,
        None if languages is None else new_languages,
    )
