"""A resumed run knows its input: what changed is named, and no output mixes two states of a source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import bytes_of, journal_of, options, output_of, parts_of, sentences, write_texts
from PIL import Image
from sample_models import Exported
from typer.testing import CliRunner

from runtime.commands.app import app
from runtime.corpus import Reading, Watcher, embed_corpus
from runtime.errors import ChangedInputError, CorpusError, DamagedFileError, InputError

TEXTS = sentences(300)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


class StoppedError(Exception):
    """Ends a run after some parts."""


def stop_after(n_parts):
    left = iter(range(n_parts - 1))

    def part_done(record):
        if next(left, None) is None:
            raise StoppedError

    return Watcher(part_done=part_done)


def begin(model, source, out, *, n_parts=2, **changes):
    with pytest.raises(StoppedError):
        embed_corpus(model, source, out, options(**changes), watcher=stop_after(n_parts))
    assert parts_of(out)


def rewrite(path, old, new):
    """Change a file without changing its size, later than it was read."""
    data = path.read_bytes()
    assert len(old) == len(new)
    assert old in data
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def lines(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def test_an_edit_of_equal_size_is_named(model, tmp_path):
    for i in range(3):
        lines(tmp_path / f"{i}.txt", TEXTS[i * 100 : i * 100 + 100])
    begin(model, f"{tmp_path}/*.txt", tmp_path / "out")
    rewrite(tmp_path / "0.txt", TEXTS[0].encode(), TEXTS[0].upper().encode())
    with pytest.raises(ChangedInputError, match=r"files were changed: 0\.txt\.") as raised:
        embed_corpus(model, f"{tmp_path}/*.txt", tmp_path / "out", options())
    assert raised.value.exit_code == 65
    lines(tmp_path / "3.txt", ["new"])
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ChangedInputError, match=r"changed: 0\.txt; added: 3\.txt; removed: 1\.txt"):
        embed_corpus(model, f"{tmp_path}/*.txt", tmp_path / "out", options())


def test_an_edit_while_the_file_is_read_is_named_and_taken_up_by_a_recheck(model, tmp_path):
    path = lines(tmp_path / "a.txt", TEXTS)
    edits = iter([lambda: rewrite(path, TEXTS[0].encode(), TEXTS[0].upper().encode())])
    watcher = Watcher(part_done=lambda record: next(edits, lambda: None)())
    with pytest.raises(ChangedInputError, match=r"a\.txt was changed while it was read.*--recheck-input"):
        embed_corpus(model, path, tmp_path / "out", options(), watcher=watcher)
    with pytest.raises(ChangedInputError, match=r"files were changed: a\.txt"):
        embed_corpus(model, path, tmp_path / "out", options())
    embed_corpus(model, path, tmp_path / "out", options(recheck_input=True))
    embed_corpus(model, path, tmp_path / "whole", options())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_edit_behind_the_back_of_the_clock_is_found_where_lines_are_read_again(model, tmp_path):
    path = lines(tmp_path / "a.txt", TEXTS)
    before = path.stat()
    begin(model, path, tmp_path / "out")
    rewrite(path, TEXTS[0].encode(), TEXTS[0].upper().encode())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChangedInputError, match="gives other rows for part 0"):
        embed_corpus(model, path, tmp_path / "out", options())


def test_a_touched_source_is_accepted_after_a_recheck(model, tmp_path):
    path = lines(tmp_path / "a.txt", TEXTS)
    begin(model, path, tmp_path / "out")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 5))
    with pytest.raises(ChangedInputError, match="--recheck-input"):
        embed_corpus(model, path, tmp_path / "out", options())
    record = embed_corpus(model, path, tmp_path / "out", options(recheck_input=True))
    assert record.this_run.rows < 300
    assert embed_corpus(model, path, tmp_path / "out", options()).this_run.rows == 0
    rewrite(path, TEXTS[130].encode(), TEXTS[130].upper().encode())
    changed = {i // 64 for i, text in enumerate(TEXTS) if TEXTS[130] in text}
    record = embed_corpus(model, path, tmp_path / "out", options(recheck_input=True))
    assert record.this_run.rows == sum(min(64, 300 - 64 * part) for part in changed)
    embed_corpus(model, path, tmp_path / "whole", options())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_pictures_behind_paths_are_part_of_the_input(model, tmp_path):
    for i in range(40):
        Image.new("RGB", (8, 8), (i * 6, 0, 0)).save(tmp_path / f"{i:02d}.bmp")
    paths = [f"{i:02d}.bmp" for i in range(40)]
    pq.write_table(pa.table({"image": paths}), tmp_path / "a.parquet")
    embed_corpus(model, tmp_path / "a.parquet", tmp_path / "out", options(rows_per_part=10))
    picture = tmp_path / "03.bmp"
    Image.new("RGB", (8, 8), "blue").save(picture)
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1))
    (tmp_path / "17.bmp").unlink()
    with pytest.raises(ChangedInputError, match=r"pictures were changed: .*03\.bmp; removed: .*17\.bmp"):
        embed_corpus(model, tmp_path / "a.parquet", tmp_path / "out", options(rows_per_part=10))
    record = embed_corpus(
        model, tmp_path / "a.parquet", tmp_path / "out", options(rows_per_part=10, recheck_input=True)
    )
    assert (record.this_run.rows, record.bad_kinds) == (20, {"missing-file": 1})


def test_an_iterable_is_resumed_by_its_name(model, tmp_path):
    begin(model, iter(TEXTS), tmp_path / "out", name="mine")
    with pytest.raises(CorpusError, match=r"source was 'items mine' and is now 'items other'"):
        embed_corpus(model, iter(TEXTS), tmp_path / "out", options(name="other"))
    with pytest.raises(ChangedInputError, match=r"Pass name= \(--name\)"):
        embed_corpus(model, iter(TEXTS), tmp_path / "out", options())
    others = [text.upper() for text in TEXTS]
    with pytest.raises(ChangedInputError, match="gives other rows for part 0"):
        embed_corpus(model, iter(others), tmp_path / "out", options(name="mine"))
    embed_corpus(model, iter(TEXTS), tmp_path / "out", options(name="mine"))
    embed_corpus(model, TEXTS, tmp_path / "whole", options())
    assert bytes_of(tmp_path / "out").keys() == bytes_of(tmp_path / "whole").keys()
    assert (output_of(tmp_path / "out")[1] == output_of(tmp_path / "whole")[1]).all()


def test_a_table_in_memory_is_known_by_its_content(model, tmp_path):
    table = pa.table({"id": list(range(300)), "text": TEXTS})
    begin(model, table, tmp_path / "out")
    with pytest.raises(CorpusError, match="source was 'table "):
        embed_corpus(model, table.set_column(1, "text", [TEXTS[::-1]]), tmp_path / "out", options())
    record = embed_corpus(model, table.to_pandas(), tmp_path / "out", options())
    assert record.total.rows == 300


def test_the_journal_holds_a_hash_of_what_each_part_read(model, tmp_path):
    source = write_texts(tmp_path / "a.parquet", TEXTS)
    embed_corpus(model, source, tmp_path / "one", options())
    embed_corpus(model, lines(tmp_path / "a.txt", TEXTS), tmp_path / "two", options())
    one, two = (
        [entry["done"]["content"] for entry in journal_of(tmp_path / name) if "done" in entry]
        for name in ("one", "two")
    )
    assert len(set(one)) == 5
    assert one == two  # the same rows from another format


def test_a_source_that_ends_in_an_error_keeps_every_whole_part_before(model, tmp_path):
    import gzip

    packed = gzip.compress("\n".join(f"{i} a line" for i in range(2_000)).encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DamagedFileError, match="Truncated compressed stream"):
        embed_corpus(model, tmp_path / "a.txt.gz", tmp_path / "out", options(rows_per_part=100))
    ids, _ = output_of(tmp_path / "out")
    assert len(ids) >= 500
    assert len(ids) % 100 == 0
    skipping = options(rows_per_part=100, reading=Reading(skip_bad_files=True))
    record = embed_corpus(model, tmp_path / "a.txt.gz", tmp_path / "skipped", skipping)
    (bad,) = record.bad_files
    assert (bad.name, bad.n_rows_read) == ("a.txt.gz", record.total.rows)
    again = embed_corpus(model, tmp_path / "a.txt.gz", tmp_path / "skipped", skipping)
    assert again.bad_files == record.bad_files
    assert json.loads((tmp_path / "skipped" / "_run.json").read_text())["bad_files"]


def test_the_outlook_says_what_is_taken_for_what_and_writes_nothing(model, tmp_path):
    (tmp_path / "c").mkdir()
    lines(tmp_path / "c" / "a.csv", ["id,caption,lang", "1,um gato,pt", "2,a dog,"])
    arguments = ["embed", str(model), str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--language", "en"]
    by_hand = ["--engine", "onnxruntime", "--precision", "fp32", "--instances", "1", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, *by_hand, "--dry-run"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    for expected in (
        "files 1 of csv",
        "id id (string), by its usual name",
        "text caption, by its usual name",
        "language column lang, by its usual name; en where it is left out",
        "rows 2",
        "tried 2 rows, 0 of them bad",
        "output 1 parts",
    ):
        assert expected in said
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(
        app, [*arguments, *by_hand, "--id", "none", "--language-column", "none", "--dry-run"]
    )
    assert "id row numbers" in " ".join(done.output.split())
    assert "language none; en where it is left out" in " ".join(done.output.split())


def test_errors_of_the_command_have_codes_by_class(model, tmp_path):
    def code(*arguments):
        done = CliRunner().invoke(
            app, ["embed", str(model), *map(str, arguments), "--out", str(tmp_path / "o")]
        )
        assert "Traceback" not in done.output
        assert len(done.output.strip().splitlines()) == 1
        return done.exit_code

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert code(tmp_path / "nothing") == 66
    assert code(tmp_path / "a.parquet") == 65
    assert code(tmp_path / "a.parquet", "--encoding", "utf-77") == 1
    assert code("http://127.0.0.1:9/a.txt", "--patience", "0.1") == 75


def test_encodings_of_vectors_and_of_texts_share_an_option(model, tmp_path):
    (tmp_path / "a.txt").write_bytes("um gato\n".encode("utf-16-le"))
    command = [
        "embed",
        str(model),
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "out"),
        "--language",
        "pt",
    ]
    by_hand = ["--engine", "onnxruntime", "--precision", "fp32", "--instances", "1", "--threads", "1"]
    done = CliRunner().invoke(
        app, [*command, *by_hand, "--encoding", "utf-16-le", "--encoding", "int8", "--json"]
    )
    assert done.exit_code == 0, done.output
    arguments = json.loads(done.stdout)["arguments"]
    assert (arguments["encoding"], arguments["reading"]) == ("int8", {"encoding": "utf-16-le"})


def test_a_record_batch_without_rows_stays_one(model):
    from runtime.corpus import BatchEmbedder

    embedder = BatchEmbedder(model, text="text", language="en", threads=1)
    batch = pa.RecordBatch.from_pylist([], schema=pa.schema([("text", pa.string())]))
    assert embedder(batch).num_rows == 0
    assert embedder(batch).schema.names == ["text", "vector", "problem"]


def test_unknown_kinds_of_bad_rows_are_refused(model, tmp_path):
    source = write_texts(tmp_path / "a.parquet", [None, "a", "b", "c"])
    embed_corpus(model, source, tmp_path / "out", options())
    with pytest.raises(CorpusError, match=r"kind 'missing-fil'; the kinds are \['null-text'\]"):
        embed_corpus(model, source, tmp_path / "out", options(retry_bad=("missing-fil",)))
    assert embed_corpus(model, source, tmp_path / "out", options(retry_bad=("null-text",))).this_run.rows == 4


def test_a_nameless_source_into_a_new_folder_needs_no_name(model, tmp_path):
    with pytest.raises(InputError):
        embed_corpus(model, iter([]), tmp_path / "out", options())
    assert embed_corpus(model, iter(["a"]), tmp_path / "out", options()).total.rows == 1
