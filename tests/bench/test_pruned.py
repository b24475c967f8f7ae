"""Measurements of a model with the vocabulary of a few languages."""

from __future__ import annotations

import numpy as np
from sample_models import Exported

from bench.pruned import captions_of, cells_of_model
from bench.records.record import record_of
from bench.reporting.pruned_table import pruned_table
from runtime import Encoder


def test_sizes_memory_and_vectors_of_a_model_are_measured(exported: Exported) -> None:
    captions = captions_of(["por_Latn", "spa_Latn"], 5)
    assert [code for _, code in captions] == ["por_Latn"] * 5 + ["spa_Latn"] * 5
    model = exported("nllb-clip")
    records, vectors = cells_of_model(model.parent, "nllb-clip", "all", captions)
    with Encoder.open(model, threads=2) as encoder:
        expected = [encoder.embed_texts([text], code)[0] for text, code in captions]
    np.testing.assert_array_equal(vectors, np.stack(expected))
    found = {record.cell["pruned"]: record for record in records}
    folder = model.parent / "nllb-clip_text_tower_fp32"
    graph = [file for file in folder.glob("1/*") if file.suffix in (".onnx", ".data")]
    assert found["graph on disk"].median == sum(file.stat().st_size for file in graph) / 1e6
    assert found["tokenizer on disk"].median == (folder / "tokenizer.json").stat().st_size / 1e6
    assert found["tokenizer of the checkpoint on disk"].median == 0
    assert found["resident"].median > found["resident without a model"].median > 10
    assert "| `nllb-clip` | all | 28," in pruned_table(records)


def test_the_table_shows_how_many_vectors_are_equal() -> None:
    cell = {"model": "m", "languages": "por,eng"}
    settings = {"n_tokens": 80_555}
    records = [
        record_of({"pruned": figure, **cell}, [value], unit="MB", settings=settings)
        for figure, value in (
            ("graph on disk", 240.04),
            ("tokenizer on disk", 3.0),
            ("resident", 300.0),
            ("resident without a model", 60.0),
        )
    ]
    equal = record_of({"pruned": "equal vectors", **cell}, [99.9], unit="%", settings={"captions": 1_200})
    last = pruned_table([*records, equal]).splitlines()[-1]
    assert last == "| `m` | por, eng | 80,555 | 240.0 | 3.0 | 300 | 60 | 99.9% of 1,200 |"
