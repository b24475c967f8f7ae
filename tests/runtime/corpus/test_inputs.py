"""Inputs of many kinds: all files are looked at before work, and each is read to its proven end or "
"refused."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from runtime.corpus import CaptionUse, Columns, Locations, Reading, open_source
from runtime.corpus.locations import expanded_braces, suffix_of
from runtime.corpus.rows import IdType, ImageFile, Problem
from runtime.corpus.sources import NumberedRows
from runtime.errors import DamagedFileError, InputError, MissingSourceError
from runtime.manifest import Modality

SKIP = Reading(skip_bad_files=True)


def rows_of(source):
    found = list(NumberedRows(source, lambda start, stop: True))
    assert [rows.start for rows in found if len(rows)] == [0, *(r.stop for r in found if len(r))][:-1]
    ids = [i for rows in found for i in rows.ids]
    items = [item for rows in found for item in rows.items]
    codes = [code for rows in found for code in rows.languages or [None] * len(rows)]
    return ids, items, codes


def kinds(items):
    return [item.kind if isinstance(item, Problem) else item for item in items]


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(files, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(first, stop):
    return {f"{i:03d}.{kind}": d for i in range(first, stop) for kind, d in (("jpg", png()), ("txt", b"t"))}


def test_a_csv_beside_a_tsv(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,a cat\n2,a dog\n")
    (tmp_path / "b.tsv").write_text("id\ttext\n3\ta cow, black\n4\ta hen\n")
    assert rows_of(open_source(tmp_path))[:2] == (
        ["1", "2", "3", "4"],
        ["a cat", "a dog", "a cow, black", "a hen"],
    )


def test_a_compressed_tsv_is_split_at_tabs(tmp_path):
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(b"id\ttext\n1\ta cat, black\n"))
    assert rows_of(open_source(tmp_path / "x.tsv.gz"))[1] == ["a cat, black"]


@pytest.mark.parametrize("name", ["b.csv", "b.jsonl", "b.parquet"])
def test_a_file_without_the_column_is_named_before_any_work(tmp_path, name):
    other = name.replace("b.", "a.")
    writers = {
        "csv": lambda path, column: path.write_text(f"id,{column}\n1,x\n"),
        "jsonl": lambda path, column: path.write_text(json.dumps({"id": 1, column: "x"}) + "\n"),
        "parquet": lambda path, column: pq.write_table(pa.table({"id": [1], column: ["x"]}), path),
    }
    writers[name.split(".")[1]](tmp_path / other, "text")
    writers[name.split(".")[1]](tmp_path / name, "caption")
    with pytest.raises(InputError, match=rf"{name} has no .*'text'.*it has \['id', 'caption'\]"):
        open_source(tmp_path)


def test_a_guessed_id_that_one_file_lacks_says_how_to_do_without(tmp_path):
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has no column 'id'.*--id none"):
        open_source(tmp_path)
    assert rows_of(open_source(tmp_path, columns=Columns(id="none")))[:2] == ([None, None], ["a", "b"])


def test_integer_ids_first_and_strings_later_are_strings(tmp_path):
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"id": ["r0"], "text": ["c"]}), tmp_path / "1.parquet")
    source = open_source(tmp_path)
    assert source.id_type is IdType.STRING
    assert rows_of(source)[0] == ["1", "2", "r0"]
    for number, value in enumerate((1, "r0")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"id": value, "text": "a"}) + "\n")
    assert rows_of(open_source(f"{tmp_path}/*.jsonl"))[0] == ["1", "r0"]


IDS = {
    "binary": (pa.array([b"a", b"\xff", None]), ["a", "wrong-id", "null-id"]),
    "float": (pa.array([1.5, 2.0, None]), ["1.5", "2", "null-id"]),
    "large floats": (pa.array([2.2e12, -0.0, float("nan")]), ["2200000000000", "0", "null-id"]),
    "dictionary": (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
    "unsigned": (pa.array([1, 2**64 - 1, 3], pa.uint64()), ["1", str(2**64 - 1), "3"]),
    "views": (pa.array(["x", "y", "z"], pa.string_view()), ["x", "y", "z"]),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_many_types(tmp_path, name):
    column, expected = IDS[name]
    pq.write_table(pa.table({"id": column, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    ids, items, _ = rows_of(open_source(tmp_path / "a.parquet"))
    assert [
        item.kind if isinstance(item, Problem) else i for i, item in zip(ids, items, strict=True)
    ] == expected
    assert rows_of(open_source(tmp_path / "a.parquet", columns=Columns(id="none")))[0] == [None] * 3


def test_ids_beyond_int64_are_strings_or_say_so(tmp_path):
    column = pa.array([1, 2**63 + 5], pa.uint64())
    for path, write in (("a.parquet", pq.write_table), ("a.feather", pyarrow.feather.write_feather)):
        write(pa.table({"id": column, "text": ["a", "b"]}), tmp_path / path)
        source = open_source(tmp_path / path)
        assert rows_of(source)[0] == ["1", str(2**63 + 5)]
        assert "are of type uint64" in source.notes[0]
        source = open_source(tmp_path / path, reading=Reading(id_type=IdType.INT64))
        ids, items, _ = rows_of(source)
        assert (ids, source.notes) == ([1, None], [])
        assert "is beyond what int64 holds. Pass --id-type string" in items[1].reason
    rows = [{"id": 2**63, "text": "a"}, {"id": -1, "text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (tmp_path / "a.jsonl", {"id": [2**63], "text": ["a"]}, rows):
        assert rows_of(open_source(source))[0][0] == str(2**63)


def test_uuids_are_ids(tmp_path):
    value = uuid.UUID(int=7)
    column = pa.array([value.bytes], pa.uuid())
    pq.write_table(pa.table({"id": column, "text": ["a"]}), tmp_path / "a.parquet")
    assert rows_of(open_source(tmp_path / "a.parquet"))[0] == [str(value)]


def test_a_guess_of_another_type_is_left_alone_and_said(tmp_path):
    table = pa.table({"id": [[1]], "text": ["a"], "language": [{"code": "en"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert (source.columns.id, source.columns.language) == (None, None)
    assert [note.split(" is of")[0] for note in source.notes] == ["column 'id'", "column 'language'"]
    with pytest.raises(InputError, match="the id column 'id' is of type list"):
        open_source(tmp_path / "a.parquet", columns=Columns(id="id"))


def test_a_language_column_can_be_left_alone(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "language": ["English"]}), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").columns.language == "language"
    assert open_source(tmp_path / "a.parquet", columns=Columns(language="none")).columns.language is None


def test_hive_partitions_are_columns(tmp_path):
    for lang in ("pt", "en", "__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / f"lang={lang}").mkdir()
        pq.write_table(pa.table({"text": [f"in {lang}"]}), tmp_path / f"lang={lang}" / "p.snappy.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "q.parquet").write_bytes(b"half")
    source = open_source(tmp_path, columns=Columns(language="lang"))
    assert rows_of(source)[2] == [None, "en", "pt"]
    assert open_source(tmp_path).columns.language == "lang"
    assert any("_temporary/q.parquet" in note for note in source.notes)
    (tmp_path / "c" / "lang=de").mkdir(parents=True)
    (tmp_path / "c" / "lang=de" / "a.csv").write_text("text\nHund\n")
    assert rows_of(open_source(tmp_path / "c"))[2] == ["de"]


def test_fields_of_structs(tmp_path):
    rows = [{"meta": {"caption": "a cat", "lang": "en", "key": {"n": 5}}}, {"meta": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = Columns(id="meta.key.n", text="meta.caption", language="meta.lang")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", pa.Table.from_pylist(rows), rows):
        ids, items, codes = rows_of(open_source(source, columns=columns))
        assert (ids[0], kinds(items), codes) == (5, ["a cat", "null-text"], ["en", None])
    with pytest.raises(InputError, match=r"has no field 'nothing'"):
        open_source(tmp_path / "a.parquet", columns=Columns(text="meta.nothing"))
    with pytest.raises(InputError, match=r"--text meta\.caption"):
        open_source(tmp_path / "a.parquet", columns=Columns(text="meta"))


def test_lists_of_captions(tmp_path):
    rows = [{"id": "x", "text": ["one", "two"]}, {"id": "y", "text": []}, {"id": "z", "text": ["three"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(InputError, match=r"holds lists.*--captions first"):
            open_source(tmp_path / name)
        first = open_source(tmp_path / name, reading=Reading(captions=CaptionUse.FIRST))
        assert kinds(rows_of(first)[1]) == ["one", "null-text", "three"]
        each = open_source(tmp_path / name, reading=Reading(captions=CaptionUse.EACH))
        ids, items, _ = rows_of(each)
        assert kinds(items) == ["one", "two", "null-text", "three"]
        assert ids == ["x#0", "x#1", "y#0", "z#0"]


def test_texts_as_bytes(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["gató".encode(), b"\xff\xfe", None])}), tmp_path / "a.parquet")
    items = rows_of(open_source(tmp_path / "a.parquet"))[1]
    assert items[0] == "gató"
    assert items[1] == "\udcff\udcfe"  # refused as undecodable once it is tokenized
    assert items[2].kind == "null-text"


def test_a_text_column_of_another_type_is_refused_before_any_work(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the text column 'text' is of type int64"):
        open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    if name == "a.csv":
        (tmp_path / name).write_text("text,text\na,b\n")
    else:
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, tmp_path / name)
    with pytest.raises(InputError, match="has 2 columns named 'text'"):
        open_source(tmp_path / name)


def test_two_columns_of_one_name_in_memory_are_refused():
    pandas = pytest.importorskip("pandas")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    frame = pandas.DataFrame([["a", "cat", "dog"]], columns=["id", "text", "text"])
    for source in (frame, table, table.to_batches()[0], table.to_reader()):
        with pytest.raises(InputError, match="has 2 columns named 'text'"):
            open_source(source)
    assert rows_of(open_source(frame.rename(columns={"id": "text", "text": "x"})))[1] == ["a"]


def test_scalars_of_numpy_in_records_are_pythons_own():
    rows = [{"id": np.int64(i), "text": np.str_("cat"), "language": np.str_("en")} for i in (3, 4)]
    source = open_source(rows)
    assert source.id_type is IdType.INT64
    ids, items, codes = rows_of(source)
    assert (ids, items, codes) == ([3, 4], ["cat", "cat"], ["en", "en"])
    assert {type(value) for value in (*ids, *items, *codes)} == {int, str}
    assert rows_of(open_source([{"id": np.float32(2), "text": "a"}, {"id": np.str_("x"), "text": "b"}]))[
        0
    ] == [
        "2",
        "x",
    ]
    assert rows_of(open_source(np.array(["a", "b"])))[1] == ["a", "b"]


def test_rows_of_a_frame_without_its_names_are_refused():
    frame = pytest.importorskip("pandas").DataFrame({"id": [1, 2], "text": ["x", "y"]})
    for rows in (frame.iterrows(), frame.itertuples(), [row for _, row in frame.iterrows()]):
        with pytest.raises(InputError, match=r"Pass a data frame itself.*to_dict\('records'\)"):
            open_source(rows)
    assert rows_of(open_source([dict(row) for _, row in frame.iterrows()]))[:2] == ([1, 2], ["x", "y"])


def test_a_lazy_frame_is_refused_without_a_warning():
    polars = pytest.importorskip("polars")
    with pytest.raises(InputError, match=r"LazyFrame, a query that has not run.*collect\(\)"):
        open_source(polars.DataFrame({"text": ["x"]}).lazy())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding, name):
    contents = {
        "a.txt": "猫\ngato",
        "a.csv": 'text\n猫\n"gato"\n',
        "a.jsonl": '{"text": "猫"}\n{"text": "gato"}\n',
    }
    (tmp_path / name).write_bytes(contents[name].encode(encoding))
    assert rows_of(open_source(tmp_path / name))[1] == ["猫", "gato"]


def test_utf_16_without_a_mark_is_never_read_as_latin(tmp_path):
    (tmp_path / "a.txt").write_bytes("a cat\na dog\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"holds NUL bytes.*--text-encoding utf-16-le"):
        open_source(tmp_path / "a.txt")
    source = open_source(tmp_path / "a.txt", reading=Reading(encoding="utf-16-le"))
    assert rows_of(source)[1] == ["a cat", "a dog"]
    (tmp_path / "cut.txt").write_bytes("a cat\na dog".encode("utf-16")[:-1])
    with pytest.raises(DamagedFileError, match="truncated data"):
        rows_of(open_source(tmp_path / "cut.txt"))


def test_delimiters_and_quotes_that_are_given(tmp_path):
    (tmp_path / "a.csv").write_text("id;text\n1;'a; cat'\n2;5\" wide\n")
    with pytest.raises(InputError, match="pass --delimiter ';'"):
        open_source(tmp_path / "a.csv")
    reading = Reading(delimiter=";", quote="'")
    assert rows_of(open_source(tmp_path / "a.csv", reading=reading))[1] == ["a; cat", '5" wide']
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"half\n2\tb\n')
    with pytest.raises(DamagedFileError, match="--quote none"):
        rows_of(open_source(tmp_path / "b.tsv"))
    unquoted = open_source(tmp_path / "b.tsv", reading=Reading(quote="none"))
    assert rows_of(unquoted)[1] == ['"half', "b"]
    with pytest.raises(InputError, match="delimiter is '::'; expected one character"):
        Reading(delimiter="::")
    with pytest.raises(InputError, match="Encoding 'utf-9' is unknown"):
        Reading(encoding="utf-9")


ESCAPED = {
    "plain": 'id,text\n1,"say \\"hi\\" ok"\n2,b\n',
    "with a comma": 'id,text\n9,plain\n0,"he said \\"hi 0\\", then left"\n',
    "at the end": 'id,text\n1,"say \\"hi\\""\n2,"b"\n',
    "a field that ends with a backslash": 'id,text\n1,"C:\\dir\\"\n2,b\n',
    "over several lines": 'id,text\n1,"one\ntwo \\"three\\" four"\n',
    "in a late row": "id,text\n" + "1,a\n" * 5_000 + '1,"say \\"hi\\" ok"\n',
}
READ = {
    "plain": (['say "hi" ok', "b"], ['say \\hi\\" ok"', "b"]),
    "with a comma": (["plain", 'he said "hi 0", then left'], None),
    "at the end": (['say "hi"', "b"], None),
    "a field that ends with a backslash": (None, ["C:\\dir\\", "b"]),
    "over several lines": (['one\ntwo "three" four'], None),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_a_backslash_that_may_be_an_escape_is_refused_until_it_is_said(tmp_path, name):
    path = tmp_path / "a.csv"
    path.write_text(ESCAPED[name])
    with pytest.raises(InputError, match=r"a\.csv, row from line \d+: .*--escape '\\'.*--escape none"):
        rows_of(open_source(path))
    if name != "in a late row":
        with pytest.raises(InputError, match="--escape none"):
            open_source(path)
    escaped, plain = READ.get(name, (None, None))
    if escaped is not None:
        assert rows_of(open_source(path, reading=Reading(escape="\\")))[1] == escaped
    if plain is not None:
        assert rows_of(open_source(path, reading=Reading(escape="none")))[1] == plain


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('"{""a"": ""say \\""hi\\"" x""}"', r'{"a": "say \"hi\" x"}'),
        ('"ends with \\"""', 'ends with \\"'),
        (r"5\" disk", r"5\" disk"),
        ('"one \\\\"', "one " + 2 * "\\"),
        (r"C:\dir", r"C:\dir"),
    ],
)
def test_backslashes_that_cannot_be_escapes_are_text(tmp_path, line, text):
    (tmp_path / "a.csv").write_text(f"id,text\n1,{line}\n2,b\n")
    assert rows_of(open_source(tmp_path / "a.csv"))[1] == [text, "b"]


def test_an_escape_before_anything_else_stays(tmp_path):
    (tmp_path / "a.csv").write_text('text,x\n"C:\\dir \\"a\\" \\\\ \\,",1\nC:\\dir,2\n')
    assert rows_of(open_source(tmp_path / "a.csv", reading=Reading(escape="\\")))[1] == [
        'C:\\dir "a" \\ \\,',
        "C:\\dir",
    ]
    (tmp_path / "b.csv").write_text("text,x\na\\,b \\n,1\n")
    assert rows_of(open_source(tmp_path / "b.csv", reading=Reading(escape="\\", quote="none")))[1] == [
        "a,b \\n"
    ]
    for wrong in ({"escape": '"'}, {"escape": "\\\\"}, {"escape": ";", "delimiter": ";"}):
        with pytest.raises(InputError, match=r"expected (one|different) character"):
            Reading(**wrong)


def test_escapes_as_pandas_writes_them(tmp_path):
    pandas = pytest.importorskip("pandas")
    texts = ['say "hi", ok', "C:\\dir\\", 'one\ntwo "three"', "\\", 'a\\"b', "plain"]
    frame = pandas.DataFrame({"text": texts, "x": 1})
    frame.to_csv(tmp_path / "a.csv", index=False, doublequote=False, escapechar="\\")
    assert rows_of(open_source(tmp_path / "a.csv", reading=Reading(escape="\\")))[1] == texts


EMPTY = ["b.csv", "b.tsv", "b.parquet", "b.arrow", "b.csv.gz", "b.jsonl.gz", "b.tar"]


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_beside_others_is_damaged_or_set_aside(tmp_path, name):
    other = tmp_path / name.replace("b.", "a.")
    records = [{"id": 1, "text": "x"}]
    contents = {
        "csv": lambda: b"id,text\n1,x\n",
        "tsv": lambda: b"id\ttext\n1\tx\n",
        "parquet": lambda: table_bytes(pq.write_table, records),
        "arrow": lambda: table_bytes(pyarrow.feather.write_feather, records),
        "jsonl": lambda: b'{"id": 1, "text": "x"}\n',
        "tar": lambda: tar_bytes({"1.txt": b"x"}),
    }
    data = contents[name.split(".")[1]]()
    other.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DamagedFileError, match=name):
        open_source(tmp_path)
    source = open_source(tmp_path, reading=SKIP)
    assert rows_of(source)[1] == ["x"]
    assert [bad.name for bad in source.bad_files] == [name]


@pytest.mark.parametrize("name", ["b.jsonl", "b.txt"])
def test_an_empty_file_without_a_header_has_no_rows_and_is_named(tmp_path, name):
    (tmp_path / name.replace("b.", "a.")).write_text('{"text": "x"}\n')
    (tmp_path / name).touch()
    source = open_source(tmp_path)
    assert len(rows_of(source)[1]) == 1
    assert any(f"1 files are empty and have no rows, such as {tmp_path / name}" in n for n in source.notes)


def table_bytes(write, records):
    buffer = io.BytesIO()
    write(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def test_usual_names_are_found_in_capitals(tmp_path):
    columns = {"SAMPLE_ID": [1.0], "URL": ["http://x/a.jpg"], "TEXT": ["a cat"], "LANGUAGE": ["en"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", columns):
        assert open_source(source).columns == Columns(None, "TEXT", None, "LANGUAGE")
        assert open_source(source, columns=Columns(language="none")).columns.language is None
    assert open_source({"Text": ["a"], "text": ["b"], "ID": [1]}).columns == Columns("ID", "text", None, None)
    pq.write_table(pa.table({"ID": [[1]], "TEXT": ["a"]}), tmp_path / "b.parquet")
    source = open_source(tmp_path / "b.parquet")
    assert (source.columns.id, source.notes[0][:11]) == (None, "column 'ID'")


@pytest.mark.parametrize(
    ("name", "content", "format_", "message"),
    [
        ("a.csv", b"sep=;\r\nid;text\r\n1;a\r\n", None, r"begins with 'sep=;'.*--delimiter ';'"),
        ("a.csv", b"id,text\n1,a\x00b\n", None, "--text-encoding utf-16-le, or utf-8 if"),
        ("a.json", b'[{"id": 1, "text": "a"}]', None, r"--format jsonl.*jq -c '\.\[\]'"),
        ("a.json", b'{"images": [{}], "annotations": [{}]}', "jsonl", r"jq -c '\.annotations\[\]'"),
        ("a.json", b'{\n "id": 1,\n "text": "a"\n}\n', "jsonl", r"jq -c \. FILE"),
        ("a.feather", b"FEA1\0\0\0\0FEA1", None, "Feather of version 1.*write_feather"),
    ],
)
def test_errors_name_the_remedy(tmp_path, name, content, format_, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / name, format=format_)


def test_nul_bytes_are_text_when_the_encoding_is_said(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\x00b\n")
    assert rows_of(open_source(tmp_path / "a.csv", reading=Reading(encoding="utf-8")))[1] == ["a\0b"]


@pytest.mark.parametrize("suffix", ["tgz", "tbz2", "txz"])
def test_compressed_tars_by_their_short_suffixes(tmp_path, suffix):
    pack = {"tgz": gzip.compress, "tbz2": bz2.compress, "txz": lzma.compress}[suffix]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack(tar_bytes(samples(0, 3))))
    assert rows_of(open_source(path))[0] == ["000", "001", "002"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedFileError, match=r"cannot be read as a tar \((?!the header)"):
        rows_of(open_source(path))


def test_a_single_damaged_file_that_is_set_aside_leaves_nothing(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples(0, 3))[:600])
    with pytest.raises(DamagedFileError, match="no row can be read before the damage") as raised:
        open_source(tmp_path / "a.tar", reading=SKIP)
    assert "--skip-bad-files" not in str(raised.value)
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples(0, 3)).rstrip(b"\0")[:-600])
    source = open_source(tmp_path / "a.tar", reading=SKIP)
    assert rows_of(source)[0] == ["000", "001"]
    assert source.bad_files[0].n_rows_read == 2


def test_lines_of_json_under_another_suffix(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 1, "text": "cat"}\n')
    (tmp_path / "README").write_text("not JSON")
    assert rows_of(open_source(tmp_path, format="jsonl"))[1] == ["cat"]
    (tmp_path / "a.json").write_text('[\n{"text": "cat"}\n]\n')
    with pytest.raises(InputError, match=r"jq -c"):
        open_source(tmp_path / "a.json", format="jsonl") and open_source(tmp_path / "a.json", format="jsonl")


def test_json_that_is_nested_too_deep_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    assert kinds(rows_of(open_source(tmp_path / "a.jsonl"))[1]) == ["a", "malformed-row"]


def test_braces_and_several_sources(tmp_path):
    assert expanded_braces("s3://b/{00..02}.tar") == ["s3://b/00.tar", "s3://b/01.tar", "s3://b/02.tar"]
    assert expanded_braces("{a,b}/{9..11}") == ["a/9", "a/10", "a/11", "b/9", "b/10", "b/11"]
    assert expanded_braces("{3..1}{x}") == ["3{x}", "2{x}", "1{x}"]
    with pytest.raises(InputError, match="more than 1,000,000 names"):
        expanded_braces("{0..9999999}")
    for name in ("00", "01", "02", "{x}"):
        (tmp_path / f"{name}.txt").write_text(f"in {name}\n")
    assert rows_of(open_source(f"{tmp_path}/{{00..02}}.txt"))[1] == ["in 00", "in 01", "in 02"]
    assert rows_of(open_source(tmp_path / "{x}.txt"))[1] == ["in {x}"]
    both = Locations([f"{tmp_path}/02.txt", f"{tmp_path}/00.txt"])
    assert rows_of(open_source(both))[1] == ["in 02", "in 00"]
    with pytest.raises(InputError, match="named by more than one source"):
        open_source(Locations([str(tmp_path), f"{tmp_path}/00.txt"]))
    with pytest.raises(MissingSourceError, match=r"03\.txt does not exist"):
        open_source(f"{tmp_path}/{{02..03}}.txt")


def test_suffixes_below_queries_and_compressions():
    assert suffix_of("https://h/a.tsv.gz?sig=x.parquet#y") == ".tsv"
    assert suffix_of("s3://b/A.PARQUET") == ".parquet"
    assert suffix_of("dir.d/name") == ""


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("cut", [1, 5, 9, "half", "empty"])
def test_a_compressed_file_is_read_to_its_trailer(tmp_path, suffix, cut):
    raw = "".join(f"{i} a line\n" for i in range(5_000)).encode()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packed = pack[suffix](raw) if suffix in pack else pa.compress(raw, "zstd", asbytes=True)
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(packed)
    assert len(rows_of(open_source(path))[1]) == 5_000
    path.write_bytes(packed + packed)
    assert len(rows_of(open_source(path))[1]) == 10_000
    path.write_bytes(
        {"half": packed[: len(packed) // 2], "empty": b""}.get(cut) if isinstance(cut, str) else packed[:-cut]
    )
    with pytest.raises(DamagedFileError, match=rf"a\.txt\.{suffix} cannot be read as text"):
        rows_of(open_source(path))


def test_tars_that_follow_each_other_in_a_file_are_all_read(tmp_path):
    (tmp_path / "all.tar").write_bytes(tar_bytes(samples(0, 10)) + tar_bytes(samples(10, 20)))
    ids, items, _ = rows_of(open_source(tmp_path / "all.tar"))
    assert ids == [f"{i:03d}" for i in range(20)]
    assert items == [png()] * 20
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress((tmp_path / "all.tar").read_bytes()))
    assert rows_of(open_source(tmp_path / "all.tar.gz"))[0] == ids


def test_a_tar_is_whole_or_refused(tmp_path):
    whole = tar_bytes(samples(0, 4), format=tarfile.PAX_FORMAT)
    members = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    path = tmp_path / "a.tar"
    for at in [*members[1:], members[3] + 512, members[3] + 700, len(whole.rstrip(b"\0")) + 100]:
        path.write_bytes(whole[:at])
        with pytest.raises(DamagedFileError, match=r"a\.tar cannot be read as a tar"):
            rows_of(open_source(path))
    for at in members[1:]:
        path.write_bytes(whole[: at + 150] + b"99" + whole[at + 152 :])
        with pytest.raises(DamagedFileError, match=rf"at byte {at:,}, is damaged"):
            rows_of(open_source(path))
    path.write_bytes(whole + b"something else" * 100)
    with pytest.raises(DamagedFileError, match="is damaged"):
        rows_of(open_source(path))
    path.write_bytes(gzip.compress(whole)[:-4])
    path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(DamagedFileError, match="Truncated compressed stream"):
        rows_of(open_source(tmp_path / "a.tar.gz"))


def test_bad_files_are_set_aside_on_request(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(samples(0, 3)))
    (tmp_path / "1.tar").write_bytes(tar_bytes(samples(3, 9)).rstrip(b"\0")[:-600])
    (tmp_path / "2.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "3.tar").write_bytes(tar_bytes(samples(9, 11)))
    source = open_source(tmp_path, reading=SKIP)
    ids = rows_of(source)[0]
    assert ids[:3] == ["000", "001", "002"]
    assert ids[-2:] == ["009", "010"]
    assert [bad.name for bad in source.bad_files] == ["2.tar", "1.tar"]
    assert source.bad_files[1].n_rows_read == len(ids) - 5
    with pytest.raises(DamagedFileError):
        open_source(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(InputError, match="All 1 files of the source are damaged"):
        open_source(tmp_path / "x", reading=SKIP)


def test_a_first_sample_without_its_image_decides_nothing(tmp_path):
    files = samples(0, 5)
    del files["000.jpg"]
    (tmp_path / "0.tar").write_bytes(tar_bytes(files))
    source = open_source(tmp_path / "0.tar")
    assert source.modality is Modality.IMAGE
    assert kinds(rows_of(source)[1]) == ["missing-file", *[png()] * 4]
    late = {f"{i:03d}.txt": b"t" for i in range(100)} | {"100.jpg": png()}
    (tmp_path / "0.tar").write_bytes(tar_bytes(late))
    source = open_source(tmp_path / "0.tar")
    assert source.modality is Modality.TEXT
    with pytest.raises(InputError, match=r"sample '100' has an image.*Pass --text txt or --image image"):
        rows_of(source)
    chosen = open_source(tmp_path / "0.tar", columns=Columns(text="txt"))
    assert kinds(rows_of(chosen)[1])[-1] == "missing-file"


def test_an_arrow_stream_is_read_to_its_end_mark(tmp_path):
    table = pa.table({"text": [str(i) for i in range(9)]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert len(rows_of(open_source(tmp_path / "a.arrow"))[1]) == 9
    (tmp_path / "a.arrow").write_bytes(whole[:-8])
    with pytest.raises(DamagedFileError, match="without its end mark"):
        open_source(tmp_path / "a.arrow")
    pa.feather.write_feather(table, tmp_path / "a.feather")
    data = (tmp_path / "a.feather").read_bytes()
    (tmp_path / "a.feather").write_bytes(data[:-20])
    with pytest.raises(DamagedFileError, match=r"a\.feather cannot be read as arrow"):
        open_source(tmp_path / "a.feather")


def test_a_flipped_byte_in_a_page_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text {i}" for i in range(100)]}),
        path,
        row_group_size=20,
        use_dictionary=False,
        write_page_checksum=True,
        compression="none",
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"text 50")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="CRC checksum verification failed"):
        rows_of(open_source(path))
    items = kinds(rows_of(open_source(path, reading=SKIP))[1])
    assert len(items) == 100
    assert items[:40] == [f"text {i}" for i in range(40)]
    assert items[40:] == ["damaged-file"] * 60


def test_rows_of_captions_before_damage_are_counted(tmp_path):
    path = tmp_path / "a.parquet"
    captions = [[f"um {i}", f"one {i}"] for i in range(60)]
    pq.write_table(
        pa.table({"text": captions}), path, row_group_size=20, use_dictionary=False, compression="none"
    )
    data = path.read_bytes()
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
    source = open_source(path, reading=Reading(captions=CaptionUse.EACH, skip_bad_files=True))
    assert rows_of(source)[1] == [caption for pair in captions[:40] for caption in pair]
    assert [bad.n_rows_read for bad in source.bad_files] == [80]


def test_malformed_addresses_are_their_rows_own(tmp_path):
    cells = ["foo://bar/x.png", "http://[::1", "s3://a b/c", "a\0b", "data:image/png;base64,@@", "", "x.png"]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    items = rows_of(open_source(tmp_path / "a.parquet"))[1]
    assert kinds(items[:6]) == ["malformed-url"] * 5 + ["null-image"]
    assert isinstance(items[6], ImageFile)
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert rows_of(open_source({"image": [url]}))[1] == [png()]


def test_standard_input_is_read_once(tmp_path, monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(b"id,text\n1,a\n2,b\n")
    source = open_source("-", format="csv", name="mine")
    assert rows_of(source)[:2] == (["1", "2"], ["a", "b"])
    given(tar_bytes(samples(0, 3)))
    assert rows_of(open_source("-", format="webdataset"))[0] == ["000", "001", "002"]
    given(b'{"text": "x"}\n' * 10)
    assert len(rows_of(open_source("-", format="jsonl"))[1]) == 10
    with pytest.raises(InputError, match="its format must be given"):
        open_source("-")


def test_tables_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["x", "y"]})
    assert rows_of(open_source(one))[:2] == (["a", "b"], ["x", "y"])
    assert rows_of(open_source(one.select([1])))[0] == ["b"]
    assert rows_of(open_source(datasets.DatasetDict({"train": one})))[1] == ["x", "y"]
    with pytest.raises(InputError, match=r"DatasetDict of the splits \['train', 'test'\]"):
        open_source(datasets.DatasetDict({"train": one, "test": one}))
    features = datasets.Features({"image": datasets.Image()})
    images = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}]}, features)
    assert rows_of(open_source(images))[1] == [png()]


def test_frames_and_relations_are_tables():
    import pandas
    import polars

    columns = {"id": [1, 2], "text": ["x", None]}
    for frame in (pandas.DataFrame(columns), polars.DataFrame(columns), pa.table(columns), columns):
        ids, items, _ = rows_of(open_source(frame))
        assert (ids, kinds(items)) == ([1, 2], ["x", "null-text"])
    duckdb = pytest.importorskip("duckdb")
    assert rows_of(open_source(duckdb.sql("select 7 as id, 'x' as text")))[:2] == ([7], ["x"])


def test_a_link_to_a_parent_is_not_followed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(png())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nothing")
    source = open_source(tmp_path)
    assert rows_of(source)[0] == ["a/x.png"]
    assert len(source.notes) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "y.png").write_bytes(png())
    assert rows_of(open_source(tmp_path, exclude=tmp_path / "out"))[0] == ["a/x.png"]


def test_a_named_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_source(tmp_path / "p.txt")


def test_csv_fields_of_every_size(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], ["x" * 300_000], ["short"]])
    assert [len(text) for text in rows_of(open_source(tmp_path / "a.csv"))[1]] == [300_000, 5]


def test_names_for_paths(tmp_path):
    assert Path(tmp_path).is_dir()
    source = open_source({"image": [str(tmp_path / "x.png")]})
    (item,) = rows_of(source)[1]
    assert item.path == str(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.gz", ".tbz2", ".txz"])
def test_tars_below_one_suffix_or_two(tmp_path, suffix):
    pack = {".tgz": gzip, ".tar.gz": gzip, ".tbz2": bz2, ".txz": lzma}.get(suffix)
    data = tar_bytes(samples(0, 3))
    (tmp_path / f"a{suffix}").write_bytes(data if pack is None else pack.compress(data))
    assert rows_of(open_source(tmp_path / f"a{suffix}"))[0] == ["000", "001", "002"]
    assert rows_of(open_source(tmp_path))[0] == ["000", "001", "002"]


def test_fields_of_json_are_no_duplicates_of_files(tmp_path):
    files = {"a.json": b'{"txt": "of json", "jpg": "x"}', "a.jpg": png(), "a.txt": b"of a file"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    assert rows_of(open_source(tmp_path / "a.tar"))[1] == [png()]
    source = open_source(tmp_path / "a.tar", columns=Columns(text="txt"))
    assert rows_of(source)[1] == ["of a file"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "um"}\n{"text": "do', "its last line is cut off inside a JSON object"),
        ("a.jsonl", '{"text": "um"}\n{"text": "dois", "n": 1', "its last line is cut off"),
        ("a.csv", "id,text\n1,um\n2", r"line 3: the last row has 1 of 2 fields and no end of line"),
    ],
)
def test_a_last_line_that_is_cut_off_is_damage(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DamagedFileError, match=message):
        rows_of(open_source(tmp_path / name))
    assert rows_of(open_source(tmp_path / name, reading=SKIP))[1] == ["um"]
    (tmp_path / name).write_text(content + "\n")  # its line was ended: the row's own fault
    assert kinds(rows_of(open_source(tmp_path / name))[1]) == ["um", "malformed-row"]


def test_blank_lines_before_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("\n\nid,text\n1,um\n")
    assert rows_of(open_source(tmp_path / "a.csv"))[1] == ["um"]


def test_a_link_to_itself_is_left_out_as_one_to_nowhere(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").symlink_to("b.png")
    source = open_source(tmp_path)
    assert rows_of(source)[0] == ["a.png"]
    assert source.notes == [f"1 links lead nowhere and were left out, such as {tmp_path / 'b.png'}"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lines_that_end_with_carriage_returns_are_not_taken_for_one(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("um gato\rum cão\rpeixe\r".encode(encoding))
    with pytest.raises(InputError, match=r"carriage returns and no line feed.*tr"):
        open_source(tmp_path / "a.txt")
    for text, n_rows in {"um\r\ndois\r\n": 2, "um": 1, "um\r": 1, "um\r\n": 1, "um\rdois\n": 1}.items():
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert len(rows_of(open_source(tmp_path / "a.txt"))[1]) == n_rows


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet", "arrow", "tar"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, suffix):
    """As Git LFS's specification shows one."""
    pointer = (
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    (tmp_path / f"a.{suffix}").write_text(pointer)
    with pytest.raises(DamagedFileError, match=r"is a Git LFS pointer of 130 bytes.*git lfs pull"):
        open_source(tmp_path / f"a.{suffix}")


def test_a_pattern_looks_no_deeper_than_it_says(tmp_path, monkeypatch):
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    looked = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path).name) or real(path))
    assert rows_of(open_source(str(tmp_path / "*.txt")))[1] == ["a.txt"]
    assert looked == [tmp_path.name]
    assert rows_of(open_source(str(tmp_path / "*" / "*.txt")))[1] == ["sub/b.txt"]
    assert "deep" not in looked
    assert len(rows_of(open_source(str(tmp_path / "**" / "*.txt")))[1]) == 3


def test_an_empty_folder_is_called_so(tmp_path):
    with pytest.raises(InputError, match="a folder without any file"):
        open_source(tmp_path)


def test_what_was_left_out_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("um\n")
    (tmp_path / "README").write_text("x")
    assert open_source(tmp_path).notes == [
        "1 files of other formats were left out, such as README (suffixes: none)"
    ]


def test_an_encrypted_file_is_called_so(tmp_path):
    pq.write_table(pa.table({"text": ["um"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-4] + b"PARE")
    with pytest.raises(InputError, match=r"a\.parquet is encrypted"):
        open_source(tmp_path / "a.parquet")


def test_pipes_are_left_out_with_a_word(tmp_path):
    (tmp_path / "a.txt").write_text("um\n")
    os.mkfifo(tmp_path / "b.txt")
    source = open_source(tmp_path)
    assert rows_of(source)[1] == ["um"]
    assert source.notes == ["1 pipes, sockets or devices were left out"]


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (b"junk", "Input format not supported"),
        (lzma.compress(b"dois\n").replace(b"\xfd7zXZ", b"\xfd7zXY"), "Input format not supported"),
        (bytes(3), "3 zero bytes follow"),
        (bytes(3) + lzma.compress(b"dois\n"), "are not padding"),
        (lzma.compress(b"dois\n")[:-1], "ends before the end of its stream"),
        (lzma.compress(b"dois\n")[:5], "ends before the end of its stream"),
        (b"", None),
        (bytes(512), None),
        (lzma.compress(b"dois\n"), None),
        (bytes(8) + lzma.compress(b"dois\n"), None),
    ],
)
def test_all_streams_of_an_xz_file_are_read_and_nothing_else_may_follow(tmp_path, after, message):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"um\n") + after)
    if message is None:
        assert rows_of(open_source(path))[1] == (["um", "dois"] if after.strip(b"\0") else ["um"])
    else:
        with pytest.raises(DamagedFileError, match=message):
            rows_of(open_source(path))


def test_a_key_that_an_object_has_twice_is_its_rows_fault(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"id": 1, "text": "um", "text": "dois"}\n'
        '{"id": 2, "text": "text"}\n'
        '{"id": 3, "text": "say \\"text\\" and \\"id\\"", "other": {"text": 1}}\n'
        '{"id": 4, "id": 5, "text": "um"}\n'
        '{"id": 6, "text": "um", "other": 1, "other": 2}\n'
    )
    items = rows_of(open_source(tmp_path / "a.jsonl"))[1]
    assert kinds(items) == ["malformed-row", "text", 'say "text" and "id"', "malformed-row", "um"]
    assert 'the key "text" twice' in items[0].reason
    (tmp_path / "b.jsonl").write_text(
        '{"meta": {"caption": "um", "caption": "dois"}}\n{"meta": {"caption": "um"}}\n'
    )
    nested = open_source(tmp_path / "b.jsonl", columns=Columns(text="meta.caption"))
    assert kinds(rows_of(nested)[1]) == ["malformed-row", "um"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_are_split_alike_wherever_a_read_ends(tmp_path, suffix):
    """Ends of lines, of characters of several bytes and of reads fall together in all ways."""
    lines = [("é" * (i % 7) + "狗" * (i % 5) + f" {i}") for i in range(9_000)]
    lines[5_000] = "é" * 70_000
    content = "".join(line + ("\r\n" if i % 3 else "\n") for i, line in enumerate(lines))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"a-{encoding}.txt{suffix}"
        data = content.removesuffix("\n").removesuffix("\r").encode(encoding)
        path.write_bytes(gzip.compress(data) if suffix else data)
        assert rows_of(open_source(path))[1] == lines
