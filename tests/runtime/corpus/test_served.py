"""The same run against a server: strings and files go out, rows come back in order, bad ones stay here."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from corpus_runs import bad_rows_of, bytes_of, options, output_of, write_texts
from server_double import DIM, Double, Running, vector_of

from runtime import Encoder
from runtime.corpus import EngineChoice, embed_corpus, embedded_batches
from runtime.errors import CorpusError
from samples import dataset
from triton_models.spec import TextLimits


@pytest.fixture
def server() -> Iterator[Running]:
    running = Running(Double())
    yield running
    running.kill()


def test_texts_go_to_a_server(server, tmp_path):
    texts = [f"gato {i % 150}" for i in range(200)]
    texts[7], texts[8] = None, "half \ud800"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    served = options(engine=EngineChoice())
    record = embed_corpus(server.address, path, tmp_path / "out", served)
    ids, vectors = output_of(tmp_path / "out")
    assert ids == [i for i in range(200) if i not in (7, 8)]
    np.testing.assert_array_equal(vectors, np.stack([vector_of(texts[i].encode(), DIM) for i in ids]))
    assert [row["kind"] for row in bad_rows_of(tmp_path / "out")] == ["null-text", "undecodable-text"]
    assert record.arguments["engine"] == "onnxruntime"
    assert embed_corpus(server.address, path, tmp_path / "out", served).this_run.rows == 0


def test_images_go_to_a_server(server, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pngs = [drawing.png for drawing in dataset.load_gallery()[:20]]
    for i, png in enumerate(pngs):
        (folder / f"{i:02d}.png").write_bytes(png)
    (folder / "99.png").write_bytes(b"no image")
    record = embed_corpus(server.address, folder, tmp_path / "out", options(engine=EngineChoice()))
    ids, vectors = output_of(tmp_path / "out")
    assert ids == [f"{i:02d}.png" for i in range(20)]
    np.testing.assert_array_equal(vectors, np.stack([vector_of(png, DIM) for png in pngs]))
    assert record.bad_kinds == {"corrupt-image": 1}


@pytest.mark.parametrize("runs_at_once", [1, 3])
def test_batches_come_from_a_server_too(server, runs_at_once):
    texts = [f"gato {i}" for i in range(100)]
    texts[7] = None
    with Encoder.open(server.address) as encoder:
        found = list(embedded_batches(encoder, texts, rows_per_batch=40, runs_at_once=runs_at_once))
    assert [len(batch.ids) for batch in found] == [39, 40, 20]
    ids = [i for batch in found for i in batch.ids]
    expected = np.stack([vector_of(texts[i].encode(), DIM) for i in ids])
    np.testing.assert_array_equal(np.concatenate([batch.vectors for batch in found]), expected)
    assert [row.kind for batch in found for row in batch.bad] == ["null-text"]


def test_requests_at_once_change_nothing(server, tmp_path):
    source = write_texts(tmp_path / "a.parquet", [f"text {i}" for i in range(300)])
    embed_corpus(server.address, source, tmp_path / "whole", options(engine=EngineChoice()))
    with pytest.raises(CorpusError, match="set on the server"):
        embed_corpus(server.address, source, tmp_path / "out", options(engine=EngineChoice(threads=1)))
    embed_corpus(server.address, source, tmp_path / "out", options(engine=EngineChoice(instances=2)))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_text_that_a_server_refuses_is_its_rows_fault(tmp_path):
    limits = TextLimits(max_characters=1_000, max_bytes=1_500, max_request_characters=2_000)
    server = Running(Double(limits=limits))
    try:
        texts = [*(f"{i} " + "x" * 900 for i in range(40)), "x" * 1_001, "猫" * 501, "y" * 1_000]
        source = write_texts(tmp_path / "a.parquet", texts)
        embed_corpus(server.address, source, tmp_path / "out", options(engine=EngineChoice()))
    finally:
        server.kill()
    rows = bad_rows_of(tmp_path / "out")
    assert [(row["row"], row["kind"]) for row in rows] == [(40, "too-long-text"), (41, "too-long-text")]
    assert "1,001 characters; the server takes 1,000 at most" in rows[0]["reason"]
    assert "1,503 bytes; the server takes 1,500 at most" in rows[1]["reason"]
    assert len(output_of(tmp_path / "out")[0]) == 41
