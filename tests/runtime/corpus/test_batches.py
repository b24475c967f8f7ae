"""The pipeline in Python: batches from an encoder, and a callable for other frameworks' jobs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from corpus_runs import options, sentences, write_texts
from sample_models import Exported

from runtime import Encoder
from runtime.corpus import BatchEmbedder, Columns, embedded_batches
from runtime.corpus.job import preparation_for
from runtime.corpus.pipeline import PartAssembly
from runtime.corpus.prepare import TextPreparation
from runtime.corpus.rows import Rows
from runtime.corpus.slices import Slice
from runtime.errors import InputError
from runtime.manifest import Modality
from samples import dataset

TEXTS = ["gato", None, "cão", "gato", ""]


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-siglip-mrl")


@pytest.fixture(scope="module")
def encoder(model):
    with Encoder.open(model, threads=1, instances=2) as opened:
        yield opened


@pytest.mark.parametrize("runs_at_once", [1, 2])
def test_batches_of_a_file_and_of_an_iterable(encoder, tmp_path, runs_at_once):
    texts = sentences(200)
    path = write_texts(tmp_path / "a.parquet", texts, id=list(range(100, 300)))
    expected = encoder.embed_texts(texts, "pt")
    for source, ids in ((path, range(100, 300)), (iter(texts), range(200))):
        found = list(
            embedded_batches(encoder, source, language="pt", rows_per_batch=64, runs_at_once=runs_at_once)
        )
        assert [len(batch.ids) for batch in found] == [64, 64, 64, 8]
        assert [i for batch in found for i in batch.ids] == list(ids)
        np.testing.assert_allclose(np.concatenate([b.vectors for b in found]), expected, atol=2e-6)


def test_a_table_in_memory_is_embedded_by_row(encoder):
    expected = encoder.embed_texts(["gato", "cão"], "pt")
    table = {"text": ["gato", "cão"], "language": ["pt", "pt"]}
    (batch,) = embedded_batches(encoder, table)
    np.testing.assert_allclose(batch.vectors, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": "64"}, "dim is '64', of type str; expected a whole number"),
        ({"dim": -1}, "has no vectors of width -1"),
        ({"dim": 65}, "has no vectors of width 65"),
        ({"rows_per_batch": 1.5}, r"rows_per_batch is 1\.5, of type float"),
        ({"runs_at_once": 0}, "runs_at_once is 0; expected at least 1"),
        ({"max_batch_tokens": True}, "max_batch_tokens is True, of type bool"),
    ],
)
def test_a_count_that_is_none_is_refused(encoder, options, message):
    with pytest.raises(InputError, match=message):
        list(embedded_batches(encoder, ["a"], language="pt", **options))


def test_images_and_bad_rows(encoder):
    png = dataset.load_gallery()[0].png
    items = [{"name": "a", "photo": png}, {"name": "b", "photo": b"no"}, {"name": "c", "photo": png}]
    (batch,) = embedded_batches(encoder, items, columns=Columns(id="name", image="photo"), encoding="int8")
    assert batch.ids == ["a", "c"]
    assert batch.vectors.dtype == np.int8
    assert [(row.id, row.kind) for row in batch.bad] == [("b", "corrupt-image")]


def test_a_loop_that_is_left_leaves_nothing_running(encoder):
    import threading

    for _ in embedded_batches(encoder, iter(sentences(500)), language="pt", rows_per_batch=16):
        break
    assert not [t for t in threading.enumerate() if t.name == "babeltower-corpus" and t.is_alive()]


def test_a_callable_for_other_frameworks(model, encoder):
    pandas = pytest.importorskip("pandas")
    embedder = BatchEmbedder(model, text="text", language="pt", threads=1)
    expected = encoder.embed_texts(["gato", "cão", "gato"], "pt")
    arrays = embedder({"text": np.asarray(TEXTS, dtype=object), "n": np.arange(5)})
    np.testing.assert_allclose(arrays["vector"][[0, 2, 3]], expected, atol=2e-6)
    assert np.isnan(arrays["vector"][[1, 4]]).all()
    table = embedder(pa.table({"text": TEXTS, "n": list(range(5))}))
    frame = embedder(pandas.DataFrame({"text": TEXTS}))
    for vectors, problems in (
        (table["vector"].to_pylist(), table["problem"].to_pylist()),
        (frame["vector"].tolist(), frame["problem"].tolist()),
    ):
        np.testing.assert_allclose([vectors[i] for i in (0, 2, 3)], expected, atol=2e-6)
        assert [v is None for v in vectors] == [False, True, False, False, True]
        assert problems[1].startswith("null-text: ")
        assert problems[4].startswith("empty-text: ")
    assert embedder({"text": np.asarray([], dtype=object)})["vector"].shape == (0, encoder.dim)


def test_columns_that_are_wrong(model):
    with pytest.raises(InputError, match="exactly one column"):
        BatchEmbedder(model)
    with pytest.raises(InputError, match="has no column 'text'"):
        BatchEmbedder(model, text="text", language="pt")({"caption": np.asarray(["a"])})


def test_a_part_is_split_within_its_budget_and_hardly_padded(encoder):
    texts = [" ".join(["gato"] * (1 + 37 * i % 40) + [str(i)]) for i in range(400)]
    preparation = TextPreparation(encoder, language="por_Latn", max_batch_tokens=256)
    rows = Rows(start=0, ids=[str(i) for i in range(400)], items=texts)
    batches = preparation.prepared(Slice(0, rows)).batches
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(400))
    counts = [batch.counts for batch in batches]
    assert all(c.tokens + c.padding_tokens <= 256 for c in counts)
    assert sum(c.padding_tokens for c in counts) < 0.05 * sum(c.tokens for c in counts)


def test_a_part_holds_no_batches(encoder):
    """Its images' pixels would be gigabytes: 150 kB for each of 32,768 rows."""
    preparation = preparation_for(encoder, Modality.TEXT, options())
    prepared = preparation.prepared(Slice(0, Rows(0, [0, 1], ["um gato", "a dog"])))
    (batch,) = prepared.batches
    held = weakref.ref(batch.tokens.ids)
    part = PartAssembly(0, 0, 4, 2)
    part.add_slice(prepared)
    part.add_vectors(batch.rows, batch.counts, np.ones((2, 4), dtype=np.float32))
    part.end_at(2)
    del prepared, batch
    gc.collect()
    assert held() is None
    assert part.is_complete
    assert part.finished(has_ids=True).ids == [0, 1]
