"""Folders of vectors for tests, laid out as ``babeltower embed`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.embeddings import Encoding, encoded_from_float

__all__ = ["unit_vectors", "write_shard", "write_vectors"]


def unit_vectors(n: int, dim: int = 32, *, seed: int = 0) -> NDArray[np.float32]:
    """Random directions: float32 (n, dim)."""
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_shard(
    path: Path,
    ids: Sequence[str] | Sequence[int],
    vectors: NDArray[Any],
    *,
    fingerprint: str = "space",
    dim: int | None = None,
    encoding: Encoding = Encoding.FLOAT32,
    modality: str = "text",
    source: str = "captions.parquet",
    **metadata: str,
) -> Path:
    """Write one Parquet file; ``vectors`` are stored as they are."""
    import pyarrow
    import pyarrow.parquet

    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    said = {
        "version": "1",
        "model": "model",
        "fingerprint": fingerprint,
        "dim": str(dim or vectors.shape[1]),
        "encoding": encoding.value,
        "modality": modality,
        "source": source,
        **metadata,
    }
    schema = pyarrow.schema(
        [
            pyarrow.field("id", pyarrow.array(ids).type, nullable=False),
            pyarrow.field("vector", column.type, nullable=False),
        ],
        metadata={f"babeltower.{key}": value for key, value in said.items()},
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(ids), column], schema=schema), path)
    return path


def write_vectors(
    folder: Path, vectors: NDArray[np.float32], *, n_shards: int = 3, encoding: Encoding = Encoding.FLOAT32
) -> Path:
    """A folder of shards of unlike length; row 7 is called ``row 7``."""
    folder.mkdir(parents=True)
    stored = encoded_from_float(vectors, encoding)
    bounds = [len(vectors) * i * (i + 1) // (n_shards * (n_shards + 1)) for i in range(n_shards + 1)]
    for i in range(n_shards):
        rows = range(bounds[i], bounds[i + 1])
        write_shard(
            folder / f"part-{i:05d}.parquet",
            [f"row {row}" for row in rows],
            stored[rows.start : rows.stop],
            dim=vectors.shape[1],
            encoding=encoding,
        )
    (folder / "journal.jsonl").write_text("{}\n")
    (folder / "run.json").write_text("{}")
    return folder
