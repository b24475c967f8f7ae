"""What a corpus's rows were, by their ids: for those who look at results, not for those who embed."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

from runtime.corpus.rows import ImageFile, Problem
from runtime.corpus.sources import NumberedRows, Source, SourceFormat
from runtime.preprocessing.image import Snapshot, decode

__all__ = ["items_of_ids"]


def items_of_ids(source: Source, ids: Collection[str]) -> dict[str, Any]:
    """Texts, or encoded images, by id as a string; what the source does not have is left out.

    Args:
        source: As it was opened to be embedded. Without ids of its own, its row numbers are the ids; only
            the pieces that hold these rows are read then. Otherwise reading stops when all are found.

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
    """The item as a text or an encoded image; ``None`` for what could not be embedded either."""
    if isinstance(item, ImageFile):
        item = item.read()
    if isinstance(item, Snapshot):
        file = io.BytesIO()
        decode(item).convert("RGB").save(file, "PNG")
        return file.getvalue()
    return None if isinstance(item, Problem) else item
