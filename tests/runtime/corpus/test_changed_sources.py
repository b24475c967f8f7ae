"""A changed source is taken up by ``--recheck-input``: the folder is that of a fresh run over it."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import bytes_of, options, parts_of, sentences, write_texts
from PIL import Image
from sample_models import Exported

from runtime.corpus import Reading, SourceFormat, embed_corpus
from runtime.corpus.folder.inspection import check_of_folder, status_of_folder
from runtime.corpus.input_record import InputRecord
from runtime.corpus.journal import Journal
from runtime.corpus.stores import store_from_location
from runtime.errors import ChangedInputError, CorpusError, DamagedVectorsError

TEXTS = sentences(300)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


def lines(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def require_fresh(model, source, out, **changes):
    """Check that a folder equals that of a fresh run, and that the same command finds nothing to do."""
    fresh = out.with_name(f"{out.name}-fresh")
    embed_corpus(model, source, fresh, options(**changes))
    assert bytes_of(out) == bytes_of(fresh)
    assert check_of_folder(store_from_location(out)).problems == ()
    assert embed_corpus(model, source, out, options(**changes)).this_run.rows == 0


CHANGES = {
    "edited": ([TEXTS[:150], TEXTS[150:]], [TEXTS[:150], [*TEXTS[150:299], "another length"]]),
    "grown": ([TEXTS[:100], TEXTS[100:200]], [TEXTS[:100], TEXTS[100:]]),
    "shrunk": ([TEXTS[:150], TEXTS[150:]], [TEXTS[:150], TEXTS[150:160]]),
    "removed": ([TEXTS[:150], TEXTS[150:]], [TEXTS[:150]]),
    "added-before": ([TEXTS[:64], TEXTS[128:]], [TEXTS[:64], ["new"], TEXTS[128:]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_taken_up(model, tmp_path, change):
    before, after = CHANGES[change]
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    names = ["0.txt", "2.txt"] if len(after) == 3 else ["0.txt", "1.txt"]
    for name, texts in zip(names, before, strict=True):
        lines(source / name, texts)
    embed_corpus(model, source, out, options())
    inodes = {path.name: path.stat().st_ino for path in parts_of(out)}
    for path in source.iterdir():
        path.unlink()
    for number, texts in enumerate(after):
        lines(source / f"{number}.txt", texts)
    with pytest.raises(ChangedInputError, match="--recheck-input"):
        embed_corpus(model, source, out, options())
    embed_corpus(model, source, out, options(recheck_input=True))
    require_fresh(model, source, out)
    assert inodes["part-00000.parquet"] == parts_of(out)[0].stat().st_ino  # its rows are equal: kept


def test_a_changed_table_is_taken_up_after_an_append_with_its_kept_columns(model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    keep = {"keep": ("width",)}
    write_texts(source / "0.parquet", [None, *TEXTS[1:130]], width=list(range(130)))
    embed_corpus(model, source, out, options(**keep))
    write_texts(source / "1.parquet", TEXTS[130:200], width=list(range(70)))
    embed_corpus(model, source, out, options(append=True, **keep))
    write_texts(source / "1.parquet", TEXTS[130:201], width=list(range(71)))
    embed_corpus(model, source, out, options(recheck_input=True, **keep))
    require_fresh(model, source, out, **keep)
    widths = [*range(64), -5, *range(65, 130)]
    write_texts(source / "0.parquet", [None, *TEXTS[1:130]], width=widths)  # the texts are the same
    record = embed_corpus(model, source, out, options(recheck_input=True, **keep))
    assert record.this_run.rows == 64
    assert -5 in pa.concat_tables(map(pq.read_table, parts_of(out)))["width"].to_pylist()


@pytest.mark.parametrize("step", ["reopen", "agree", "write_files"])
def test_a_kill_between_the_steps_of_a_recheck_loses_nothing(model, tmp_path, monkeypatch, step):
    source, out = lines(tmp_path / "a.txt", TEXTS), tmp_path / "out"
    embed_corpus(model, source, out, options())
    lines(source, [*TEXTS[:70], "a new row", *TEXTS[70:200]])
    holder = InputRecord if step == "write_files" else Journal

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(holder, step, killed)
        with pytest.raises(KeyboardInterrupt):
            embed_corpus(model, source, out, options(recheck_input=True))
    with pytest.raises(CorpusError, match="--recheck-input"):
        embed_corpus(model, source, out, options())
    embed_corpus(model, source, out, options(recheck_input=True))
    require_fresh(model, source, out)


def test_other_arguments_are_still_refused(model, tmp_path):
    source, out = lines(tmp_path / "a.txt", TEXTS), tmp_path / "out"
    embed_corpus(model, source, out, options())
    lines(source, TEXTS[:10])
    with pytest.raises(CorpusError, match="rows_per_part was 64 and is now 32"):
        embed_corpus(model, source, out, options(recheck_input=True, rows_per_part=32))


def test_a_changed_source_is_not_taken_up_beside_living_workers(model, tmp_path):
    source, out = lines(tmp_path / "a.txt", TEXTS), tmp_path / "out"
    embed_corpus(model, source, out, options())
    lines(source, TEXTS[:10])
    with Journal(store_from_location(out)), pytest.raises(CorpusError, match="1 other workers"):
        embed_corpus(model, source, out, options(recheck_input=True))
    assert len(parts_of(out)) == 5


def test_a_table_in_memory_and_an_iterable_are_taken_up(model, tmp_path):
    out = tmp_path / "out"
    embed_corpus(model, pa.table({"text": TEXTS}), out, options())
    record = embed_corpus(model, pa.table({"text": TEXTS[:100]}), out, options(recheck_input=True))
    assert (record.this_run.rows, record.total.rows) == (36, 100)
    named = tmp_path / "named"
    embed_corpus(model, iter(TEXTS), named, options(name="mine"))
    for others in (TEXTS[:150], [*TEXTS, "one more"], [TEXTS[1], *TEXTS[1:]]):
        with pytest.raises(ChangedInputError, match="--recheck-input"):
            embed_corpus(model, iter(others), named, options(name="mine"))
        assert check_of_folder(store_from_location(named)).rows == 300
    record = embed_corpus(model, iter(TEXTS[:150]), named, options(name="mine", recheck_input=True))
    assert record.total.rows == 150
    assert embed_corpus(model, iter(TEXTS[:150]), named, options(name="mine")).this_run.rows == 0


def test_standard_input_is_compared_by_a_finished_run(model, tmp_path, monkeypatch):
    def embedded(texts):
        data = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
        return embed_corpus(model, "-", tmp_path / "out", options(name="mine", format=SourceFormat.TEXT))

    embedded(TEXTS[:128])
    assert embedded(TEXTS[:128]).this_run.rows == 0
    for others in (["changed", *TEXTS[1:128]], TEXTS[:127], TEXTS[:129], TEXTS[:300]):
        with pytest.raises(ChangedInputError, match="The source gives") as raised:
            embedded(others)
        assert raised.value.exit_code == 65
    assert embedded(TEXTS[:128]).total.rows == 128


def test_touched_pictures_are_recorded_by_a_recheck_and_mended_ones_by_a_retry(model, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i * 9, 0, 0)).save(tmp_path / f"{i:02d}.bmp")
    (tmp_path / "03.bmp").write_bytes(b"BM damaged")
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [f"{i:02d}.bmp" for i in range(20)]}), source)
    run = {"rows_per_part": 10}
    record = embed_corpus(model, source, tmp_path / "out", options(**run))
    (kind,) = record.bad_kinds
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "03.bmp")
    record = embed_corpus(model, source, tmp_path / "out", options(retry_bad=(kind,), **run))
    assert (record.this_run.rows, record.total.bad) == (10, 0)
    os.utime(tmp_path / "15.bmp", ns=(0, 5))
    with pytest.raises(ChangedInputError, match=r"changed: .*15\.bmp"):
        embed_corpus(model, source, tmp_path / "out", options(**run))
    assert (
        embed_corpus(model, source, tmp_path / "out", options(recheck_input=True, **run)).this_run.rows == 0
    )
    require_fresh(model, source, tmp_path / "out", **run)


def test_a_damaged_journal_is_called_so_and_the_run_begins_anew(model, tmp_path):
    source, out = lines(tmp_path / "a.txt", TEXTS[:70]), tmp_path / "out"
    embed_corpus(model, source, out, options())
    for path in (out / "_journal").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    for look in (check_of_folder, status_of_folder):
        with pytest.raises(DamagedVectorsError, match=r"journal of .* is damaged: \d+ of its entries"):
            look(store_from_location(out))
    assert embed_corpus(model, source, out, options()).this_run.rows == 70
    require_fresh(model, source, out)


def test_pictures_behind_links_that_are_fetched_later_are_embedded(model, tmp_path):
    """As of git-annex: links into a folder of objects, each in a folder of its own."""
    objects = tmp_path / "objects"
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.bmp").symlink_to(f"../objects/{name}/{name}")
    (objects / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(objects / "a" / "a", "BMP")
    source = tmp_path / "in" / "t.parquet"
    pq.write_table(pa.table({"image": ["b.bmp", "a.bmp"]}), source)
    run = {"reading": Reading(patience_s=0.1)}
    record = embed_corpus(model, source, tmp_path / "out", options(**run))
    assert (record.total.rows, record.bad_kinds) == (2, {"missing-folder": 1})
    assert embed_corpus(model, source, tmp_path / "out", options(**run)).this_run.rows == 0
    (objects / "b").mkdir()
    Image.new("RGB", (8, 8), "blue").save(objects / "b" / "b", "BMP")
    record = embed_corpus(model, source, tmp_path / "out", options(**run))
    assert (record.this_run.rows, record.total.bad) == (2, 0)
    require_fresh(model, source, tmp_path / "out", **run)
