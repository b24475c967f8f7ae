"""Sources of rows: tables, lines, folders of images, tars, and Python's own iterables."""

from __future__ import annotations

from runtime.corpus.sources.base import BadFile, CaptionUse, NumberedRows, Reading, Source, SourceFormat
from runtime.corpus.sources.items import ItemSource
from runtime.corpus.sources.opening import Locations, open_source, source_format

__all__ = [
    "BadFile",
    "CaptionUse",
    "ItemSource",
    "Locations",
    "NumberedRows",
    "Reading",
    "Source",
    "SourceFormat",
    "open_source",
    "source_format",
]
