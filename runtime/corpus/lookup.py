"""Lookup of a corpus's rows by id, to show search results."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

from runtime.corpus.rows import ImageFile, Problem
from runtime.corpus.sources import NumberedRows, Source, SourceFormat
from runtime.preprocessing.image import Snapshot, decode

__all__ = ["items_of_ids"]


def items_of_ids(source: Source, ids: Collection[str]) -> dict[str, Any]:
    """Return texts or encoded images by id (as a string); ids missing from the source are left out.

    Args:
        source: Source opened as for embedding. Without an id column, row numbers are the ids, and only the
            pieces with these rows are read; otherwise reading stops once all ids are found.

    Raises:
        InputError: the source cannot be read.
    """
    has_ids = source.columns.id is not None or source.format is SourceFormat.IMAGES
    wanted = set(ids)
    numbers = {int(one) for one in wanted if one.isdecimal()}

    def needs(start: int, stop: int) -> bool:
        return has_ids or any(start <= number < stop for number in numbers)

    found: dict[str, Any] = {}
    for rows in NumberedRows(source, needs):
        names = rows.ids if has_ids else range(rows.start, rows.stop)
        for name, item in zip(names, rows.items, strict=True):
            if str(name) in wanted and (shown := _shown(item)) is not None:
                found.setdefault(str(name), shown)
        if len(found) == len(wanted):
            break
    return found


def _shown(item: Any) -> str | bytes | None:
    """Return the item as a text or an encoded image; ``None`` if it cannot be embedded."""
    if isinstance(item, ImageFile):
        item = item.read()
    if isinstance(item, Snapshot):
        file = io.BytesIO()
        decode(item).convert("RGB").save(file, "PNG")
        return file.getvalue()
    return None if isinstance(item, Problem) else item
