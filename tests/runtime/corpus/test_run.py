"""A run over a corpus: every row once, in order, right; bad rows aside; only the same run goes on."""

from __future__ import annotations

import io
import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import (
    BY_HAND,
    bad_rows_of,
    bytes_of,
    journal_of,
    options,
    output_of,
    parts_of,
    sentences,
    write_texts,
)
from PIL import Image
from sample_models import Exported
from typer.testing import CliRunner

from runtime import Encoder
from runtime.commands.app import app
from runtime.corpus import Columns, EngineChoice, Reading, Shard, Watcher, embed_corpus
from runtime.corpus.metrics import metrics_served
from runtime.embeddings import bits_from_float, int8_from_float
from runtime.errors import CorpusError, InputError
from samples import dataset


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-siglip-mrl")


@pytest.fixture(scope="module")
def encoder(model):
    with Encoder.open(model, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts():
    return sentences(300)


@pytest.fixture
def source(tmp_path, texts):
    return write_texts(tmp_path / "a.parquet", texts, id=[f"t{i}" for i in range(len(texts))])


def test_a_file_of_another_encoding_names_the_option(model, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("id,text\n1,café\n2,coração\n3,gato\n".encode("cp1252"))
    with pytest.raises(CorpusError, match="--text-encoding cp1252"):
        embed_corpus(model, path, tmp_path / "out", options())
    embed_corpus(model, path, tmp_path / "lax", options(max_bad_share=1.0))
    assert [row["id"] for row in bad_rows_of(tmp_path / "lax")] == ["1", "2"]
    assert all("--text-encoding cp1252" in row["reason"] for row in bad_rows_of(tmp_path / "lax"))
    reading = Reading(encoding="cp1252")
    assert embed_corpus(model, path, tmp_path / "right", options(reading=reading)).total.bad == 0


def test_vectors_are_the_encoders_in_the_sources_order(model, encoder, source, texts, tmp_path):
    record = embed_corpus(model, source, tmp_path / "out", options())
    ids, vectors = output_of(tmp_path / "out")
    assert ids == [f"t{i}" for i in range(300)]
    np.testing.assert_allclose(vectors, encoder.embed_texts(texts, "en"), atol=2e-6)
    assert [pq.read_metadata(p).num_rows for p in parts_of(tmp_path / "out")] == [64] * 4 + [44]
    assert record.total.rows == record.this_run.rows == 300
    assert record.total.duplicates == sum(
        len(part) - len(set(part)) for part in (texts[i : i + 64] for i in range(0, 300, 64))
    )
    assert record.padding_share < 0.35  # parts of 64 rows; of 32,768 it is below 0.01
    saved = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert saved["total"]["rows"] == 300
    assert saved["arguments"]["fingerprint"] == encoder.fingerprint


def test_exact_duplicates_are_embedded_once(model, tmp_path):
    texts = ["gato", "cão", "gato", "gato", "cão"] * 40
    source = write_texts(tmp_path / "a.parquet", texts)
    record = embed_corpus(model, source, tmp_path / "out", options(rows_per_part=1000))
    assert record.total.duplicates == 198
    ids, vectors = output_of(tmp_path / "out")
    assert ids == list(range(200))
    assert len({v.tobytes() for v in vectors}) == 2
    assert (vectors[2] == vectors[0]).all()


def test_the_schema_says_what_the_vectors_are(model, encoder, source, tmp_path):
    embed_corpus(model, source, tmp_path / "out", options())
    schema = pq.read_schema(parts_of(tmp_path / "out")[0])
    assert schema.field("id").type == pa.string()
    assert schema.field("vector").type == pa.list_(pa.float32(), encoder.dim)
    metadata = {k.decode(): v.decode() for k, v in schema.metadata.items() if k.startswith(b"babeltower")}
    assert metadata == {
        "babeltower.version": "1",
        "babeltower.model": "nllb-siglip-mrl",
        "babeltower.precision": "fp32",
        "babeltower.engine": "onnxruntime",
        "babeltower.fingerprint": encoder.fingerprint,
        "babeltower.dim": str(encoder.dim),
        "babeltower.encoding": "float32",
        "babeltower.modality": "text",
        "babeltower.source": str(source),
        "babeltower.scale": "1",
        "babeltower.decoding": "value",
    }


def test_an_output_folder_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The name .*o\\xff is not UTF-8"):
        embed_corpus("m/x", ["a"], tmp_path / "o\udcff")


def test_an_output_folder_that_is_a_file_is_named(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = write_texts(tmp_path / "a.parquet", ["a"])
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(CorpusError, match=rf"{out} is not a folder, so no output can be written to it"):
            embed_corpus(exported("nllb-clip"), source, out)


@pytest.mark.parametrize("encoding", ["float16", "int8", "binary"])
def test_encodings_and_narrow_heads(model, encoder, source, texts, tmp_path, encoding):
    from runtime.embeddings import Encoding

    dim = encoder.dims[0]
    embed_corpus(model, source, tmp_path / "out", options(encoding=Encoding(encoding), dim=dim, npy=True))
    _, vectors = output_of(tmp_path / "out")
    expected = encoder.embed_texts(texts, "en", dim=dim)
    arrays = [np.load(path) for path in sorted((tmp_path / "out" / "_npy").glob("*.npy"))]
    np.testing.assert_array_equal(np.concatenate(arrays), vectors)
    if encoding == "float16":
        assert vectors.dtype == np.float16
        np.testing.assert_allclose(vectors, expected, atol=1e-3)
    elif encoding == "int8":
        assert vectors.dtype == np.int8
        assert np.abs(vectors.astype(int) - int8_from_float(expected)).max() <= 1
    else:
        assert vectors.dtype == np.uint8
        assert vectors.shape == (300, -(-dim // 8))
        differing = np.unpackbits(vectors ^ bits_from_float(expected)).mean()
        assert differing < 1e-3


def test_bad_texts_go_to_the_side_table_and_good_ones_stay_right(model, encoder, tmp_path):
    texts = ["gato", None, "cão", "", "casa", "azul", "half \ud800 character", "pássaro"]
    codes = ["pt", "pt", "xx_Nope", "pt", None, "eng_Latn", "pt", "por_Latn"]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": i * 10, "text": t, "language": c}) + "\n"
            for i, (t, c) in enumerate(zip(texts, codes, strict=True))
        )
        + "{broken\n"
    )
    record = embed_corpus(model, path, tmp_path / "out", options(language=None, max_bad_share=1.0))
    bad = bad_rows_of(tmp_path / "out")
    assert [(row["row"], row["id"], row["kind"]) for row in bad] == [
        (1, 10, "null-text"),
        (2, 20, "unknown-language"),
        (3, 30, "empty-text"),
        (4, 40, "missing-language"),
        (6, 60, "undecodable-text"),
        (8, None, "malformed-row"),
    ]
    assert all(row["reason"].endswith(".") and len(row["reason"]) > 10 for row in bad)
    assert "xx_Nope" in bad[1]["reason"]
    ids, vectors = output_of(tmp_path / "out")
    assert ids == [0, 50, 70]
    np.testing.assert_allclose(
        vectors, encoder.embed_texts(["gato", "azul", "pássaro"], ["pt", "en", "pt"]), atol=2e-6
    )
    assert record.bad_kinds["null-text"] == 1
    assert record.total.bad == 6


def test_images_and_what_is_wrong_with_some(model, encoder, tmp_path):
    drawings = dataset.load_gallery()[:40]
    for i, drawing in enumerate(drawings):
        (tmp_path / f"{i:02d}.png").write_bytes(drawing.png)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    (tmp_path / "40.jpg").write_bytes(buffer.getvalue()[:-40])
    (tmp_path / "41.jpg").write_bytes(b"no image at all")
    (tmp_path / "42.jpg").write_bytes(b"no image at all")
    (tmp_path / "43.jpg").write_bytes(b"")
    (tmp_path / "44.png").write_bytes(drawings[3].png)
    record = embed_corpus(model, tmp_path, tmp_path.with_name("out"), options(rows_per_part=25))
    bad = bad_rows_of(tmp_path.with_name("out"))
    assert [(row["id"], row["kind"]) for row in bad] == [(f"4{i}.jpg", "corrupt-image") for i in range(4)]
    ids, vectors = output_of(tmp_path.with_name("out"))
    assert ids == [*(f"{i:02d}.png" for i in range(40)), "44.png"]
    expected = encoder.embed_images([d.png for d in [*drawings, drawings[3]]])
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert (record.total.rows, record.total.images, record.total.bad) == (45, 41, 4)


def test_image_paths_that_lead_nowhere(model, tmp_path):
    good = dataset.load_gallery()[0].png
    (tmp_path / "here.png").write_bytes(good)
    table = pa.table({"id": [1, 2, 3, 4], "image": ["here.png", "gone.png", None, "here.png"]})
    pq.write_table(table, tmp_path / "a.parquet")
    record = embed_corpus(model, tmp_path / "a.parquet", tmp_path / "out", options())
    assert [(r["id"], r["kind"]) for r in bad_rows_of(tmp_path / "out")] == [
        (2, "missing-file"),
        (3, "null-image"),
    ]
    assert output_of(tmp_path / "out")[0] == [1, 4]
    assert record.total.duplicates == 1


def test_too_many_bad_rows_stop_the_run_and_a_higher_limit_goes_on(model, tmp_path):
    source = write_texts(tmp_path / "a.parquet", [None, "a", None, None])
    with pytest.raises(CorpusError, match=r"3 of 4 rows are bad.*null-text"):
        embed_corpus(model, source, tmp_path / "out", options())
    assert not (tmp_path / "out" / "_run.json").exists()
    record = embed_corpus(model, source, tmp_path / "out", options(max_bad_share=0.8))
    assert (record.parts_done_before, record.total.bad) == (1, 3)


def test_a_part_of_bad_rows_alone_has_no_vectors(model, tmp_path):
    source = write_texts(tmp_path / "a.parquet", [None] * 64 + ["a"] * 64)
    embed_corpus(model, source, tmp_path / "out", options())
    assert [p.name for p in parts_of(tmp_path / "out")] == ["part-00001.parquet"]
    assert len(bad_rows_of(tmp_path / "out")) == 64


def test_shards_together_are_the_whole(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "whole", options())
    for index in (2, 0, 1):
        embed_corpus(model, source, tmp_path / "shards", options(shard=Shard(index, 3)))
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "whole")
    assert (tmp_path / "shards" / "_run-2-of-3.json").is_file()
    assert embed_corpus(model, source, tmp_path / "shards", options()).this_run.rows == 0
    with pytest.raises(CorpusError, match="0 <= i < n"):
        Shard(3, 3)


def test_a_finished_run_is_not_done_again(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "out", options())
    before = {p: p.stat().st_mtime_ns for p in parts_of(tmp_path / "out")}
    record = embed_corpus(model, source, tmp_path / "out", options())
    assert record.this_run.rows == 0
    assert record.total.rows == 300
    assert {p: p.stat().st_mtime_ns for p in parts_of(tmp_path / "out")} == before


def test_parts_that_were_lost_or_cut_are_done_again(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "out", options())
    whole = bytes_of(tmp_path / "out")
    parts = parts_of(tmp_path / "out")
    parts[1].unlink()
    parts[3].write_bytes(b"PAR1")
    record = embed_corpus(model, source, tmp_path / "out", options())
    assert record.this_run.rows == 128
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "pt"}, "language was 'en' and is now 'pt'"),
        ({"rows_per_part": 32}, "rows_per_part was 64 and is now 32"),
        ({"dim": 32}, "dim was"),
        ({"columns": Columns(text="text")}, None),
        ({"engine": EngineChoice()}, None),
    ],
)
def test_only_the_same_run_goes_on(model, source, tmp_path, changes, message):
    embed_corpus(model, source, tmp_path / "out", options())
    if message is None:
        assert embed_corpus(model, source, tmp_path / "out", options(**changes)).this_run.rows == 0
        return
    with pytest.raises(CorpusError, match=message):
        embed_corpus(model, source, tmp_path / "out", options(**changes))


def test_another_source_is_not_gone_on_with(model, source, tmp_path, texts):
    embed_corpus(model, source, tmp_path / "out", options())
    other = write_texts(tmp_path / "b.parquet", texts[:200])
    with pytest.raises(CorpusError, match=r"files were added: b\.parquet; removed: a\.parquet"):
        embed_corpus(model, other, tmp_path / "out", options())


def test_runs_at_once_share_the_parts(model, source, tmp_path):
    embed_corpus(model, source, tmp_path / "alone", options(rows_per_part=16))
    reached, joined = threading.Event(), threading.Event()
    records = []
    small = options(rows_per_part=16)

    def wait(record):
        reached.set()
        assert joined.wait(60)  # until the other run, which came later, has finished a part as well

    def first_run():
        watcher = Watcher(part_done=wait)
        records.append(embed_corpus(model, source, tmp_path / "out", small, watcher=watcher))

    first = threading.Thread(target=first_run)
    first.start()
    assert reached.wait(60)
    watcher = Watcher(part_done=lambda record: joined.set())
    records.append(embed_corpus(model, source, tmp_path / "out", small, watcher=watcher))
    first.join()
    assert all(record.this_run.rows > 0 for record in records)
    assert sum(record.this_run.rows for record in records) == 300
    assert all(record.total.rows == 300 for record in records)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_what_stops_the_source_keeps_the_parts_before(model, tmp_path):
    def broken():
        yield from sentences(150)
        raise InputError("the line is cut")

    with pytest.raises(InputError, match="the line is cut"):
        embed_corpus(model, broken(), tmp_path / "out", options())
    assert len(parts_of(tmp_path / "out")) == 2
    with pytest.raises(CorpusError, match="Pass name="):
        embed_corpus(model, sentences(150), tmp_path / "out", options())


def test_a_measured_choice_is_kept_by_the_journal(model, source, tmp_path):
    seen = []
    watcher = Watcher(started=lambda source, choice, total, done: seen.append((choice, total, done)))
    embed_corpus(model, source, tmp_path / "out", options(engine=EngineChoice()), watcher=watcher)
    embed_corpus(model, source, tmp_path / "out", options(engine=EngineChoice()), watcher=watcher)
    (first, total, done), (second, *_) = seen
    assert (total, done) == (300, 0)
    assert len(first.measured) >= 2
    assert second.measured is None
    assert (second.engine, second.precision, second.threads) == (first.engine, first.precision, first.threads)


def test_without_an_engine_the_message_says_what_to_install(model, source, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = (
        r"has no variant on cpu that an installed engine runs; it has .*pip install 'babeltower\[openvino\]'"
    )
    with pytest.raises(CorpusError, match=expected):
        embed_corpus(model, source, tmp_path / "out", options(engine=EngineChoice()))


def test_no_variant_for_what_was_asked(model, source, tmp_path):
    from runtime.manifest import Precision

    with pytest.raises(CorpusError, match="has no variant in int8 on cpu"):
        embed_corpus(model, source, tmp_path / "out", options(engine=EngineChoice(precision=Precision.INT8)))


def test_metrics_are_served_while_a_run_goes_on(model, source, tmp_path):
    pytest.importorskip("prometheus_client")
    with metrics_served(9109) as watcher:
        embed_corpus(model, source, tmp_path / "out", options(), watcher=watcher)
        text = urllib.request.urlopen("http://127.0.0.1:9109/metrics").read().decode()
    assert "babeltower_corpus_rows_total 300.0" in text
    assert "babeltower_corpus_parts_total 5.0" in text


def test_the_command(model, source, tmp_path):
    arguments = ["embed", str(model), str(source), "--out", str(tmp_path / "out"), "--language", "en"]
    by_hand = ["--engine", "onnxruntime", "--precision", "fp32", "--instances", "2", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, *by_hand, "--rows-per-part", "64"])
    assert done.exit_code == 0, done.output
    assert "rows        300 in 5 parts" in done.output
    record = embed_corpus(model, source, tmp_path / "api", options())
    assert bytes_of(tmp_path / "api") == bytes_of(tmp_path / "out")
    assert record.total.rows in [entry.get("end") for entry in journal_of(tmp_path / "out")]
    as_json = CliRunner().invoke(app, [*arguments, *by_hand, "--rows-per-part", "64", "--json"])
    assert json.loads(as_json.stdout)["total"]["rows"] == 300
    wrong = CliRunner().invoke(app, [*arguments, "--shard", "2/2"])
    assert wrong.exit_code == 1
    assert "0 <= i < n" in wrong.output


def test_instances_do_not_change_the_vectors(model, source, tmp_path):
    for instances in (1, 3):
        choice = EngineChoice(BY_HAND.engine, BY_HAND.precision, instances, 1)
        embed_corpus(model, source, tmp_path / str(instances), options(engine=choice))
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")
