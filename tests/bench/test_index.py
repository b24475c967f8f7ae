"""The index benchmark builds every variant and measures it with both sorts of queries."""

from __future__ import annotations

import pytest
from vector_folders import unit_vectors, write_shard

pytest.importorskip("faiss")

from bench.index import VARIANTS, cells_from_vectors
from runtime.manifest import Modality


def test_every_variant_is_measured_with_both_sorts_of_queries(tmp_path):
    vectors = {
        modality: write_shard(
            tmp_path / f"{modality.value}.parquet",
            list(range(400)),
            unit_vectors(400, seed=seed),
            modality=modality.value,
        )
        for seed, modality in enumerate(Modality)
    }
    cells = list(cells_from_vectors(vectors, tmp_path / "work", threads=1))
    assert [cell.variant for cell in cells] == [*VARIANTS] * 4
    for cell in cells:
        assert cell.index.modality == cell.rows
        assert cell.index.recall.n_queries == (40 if cell.queries == "held-out rows" else 400)
        assert (cell.index.point.recall == 1.0) or cell.variant != "flat"
