"""Embedding of large corpora: tables, lines, folders and tars to Parquet files of vectors, exactly once.

from runtime.corpus import Options, embed_corpus

record = embed_corpus("models/nllb-clip", "captions.parquet", "vectors", Options(language="por_Latn"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.corpus.batches import BatchEmbedder, EmbeddedBatch, embedded_batches
    from runtime.corpus.engines import EngineChoice
    from runtime.corpus.journal import Shard
    from runtime.corpus.options import Options, RunRecord, Watcher
    from runtime.corpus.rows import BadRow, Columns
    from runtime.corpus.run import embed_corpus
    from runtime.corpus.sources import CaptionUse, Locations, Reading, SourceFormat, open_source

__all__ = [
    "BadRow",
    "BatchEmbedder",
    "CaptionUse",
    "Columns",
    "EmbeddedBatch",
    "EngineChoice",
    "Locations",
    "Options",
    "Reading",
    "RunRecord",
    "Shard",
    "SourceFormat",
    "Watcher",
    "embed_corpus",
    "embedded_batches",
    "open_source",
]

_MODULES = {
    "BadRow": "runtime.corpus.rows",
    "BatchEmbedder": "runtime.corpus.batches",
    "EmbeddedBatch": "runtime.corpus.batches",
    "CaptionUse": "runtime.corpus.sources",
    "Columns": "runtime.corpus.rows",
    "Locations": "runtime.corpus.sources",
    "Reading": "runtime.corpus.sources",
    "EngineChoice": "runtime.corpus.engines",
    "Options": "runtime.corpus.options",
    "RunRecord": "runtime.corpus.options",
    "Shard": "runtime.corpus.journal",
    "SourceFormat": "runtime.corpus.sources",
    "Watcher": "runtime.corpus.options",
    "embed_corpus": "runtime.corpus.run",
    "embedded_batches": "runtime.corpus.batches",
    "open_source": "runtime.corpus.sources",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
