"""Folders of embedded vectors: searched exactly as they are, or through a FAISS index built from them.

from runtime.indexes import Kind, VectorIndex, index_from_vectors

index_from_vectors("vectors", "captions.index", kind=Kind.HNSW)
with VectorIndex.open("captions.index") as index:
    found = index.search_texts(encoder, ["gato preto"], "por_Latn", k=10)
"""

from __future__ import annotations

from runtime.indexes.build import index_from_vectors
from runtime.indexes.plan import Kind, Refinement, Settings
from runtime.indexes.record import IndexRecord, OperatingPoint, Recall
from runtime.indexes.shards import VectorShards
from runtime.indexes.space import Space
from runtime.indexes.vector_index import VectorIndex

__all__ = [
    "IndexRecord",
    "Kind",
    "OperatingPoint",
    "Recall",
    "Refinement",
    "Settings",
    "Space",
    "VectorIndex",
    "VectorShards",
    "index_from_vectors",
]
