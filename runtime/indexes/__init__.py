"""Search over folders of embedded vectors: exact, or through a FAISS index built from them.

from runtime.indexes import Kind, VectorIndex, index_from_vectors

index_from_vectors("vectors", "captions.index", kind=Kind.HNSW)
with VectorIndex.open("captions.index") as index:
    found = index.search_texts(encoder, ["gato preto"], "por_Latn", k=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.indexes.build import index_from_vectors
    from runtime.indexes.plan import Kind, Refinement, Settings
    from runtime.indexes.record import IndexRecall, IndexRecord, OperatingPoint
    from runtime.indexes.shards import VectorShards
    from runtime.indexes.space import Space
    from runtime.indexes.vector_index import VectorIndex

__all__ = [
    "IndexRecall",
    "IndexRecord",
    "Kind",
    "OperatingPoint",
    "Refinement",
    "Settings",
    "Space",
    "VectorIndex",
    "VectorShards",
    "index_from_vectors",
]

_MODULES = {
    "IndexRecord": "runtime.indexes.record",
    "Kind": "runtime.indexes.plan",
    "OperatingPoint": "runtime.indexes.record",
    "IndexRecall": "runtime.indexes.record",
    "Refinement": "runtime.indexes.plan",
    "Settings": "runtime.indexes.plan",
    "Space": "runtime.indexes.space",
    "VectorIndex": "runtime.indexes.vector_index",
    "VectorShards": "runtime.indexes.shards",
    "index_from_vectors": "runtime.indexes.build",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
