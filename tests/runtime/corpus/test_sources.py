"""Every kind of source gives the same numbered rows, and says what is wrong with a bad one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageSequence

from runtime.corpus import Columns, Reading, SourceFormat, open_source
from runtime.corpus.rows import ImageFile, Problem, Rows, slices_from_rows
from runtime.corpus.sources import NumberedRows
from runtime.errors import DamagedFileError, ImageError, InputError
from runtime.manifest import Modality
from runtime.preprocessing.image import decode

TEXTS = ["a cat", "um gato, preto", 'a "quoted" dog\nover two lines', None, "  ", "猫", "ένα σκυλί"]
LANGUAGES = ["eng_Latn", "por_Latn", None, "en", "en", "ja", "el"]
IDS = [f"row-{i}" for i in range(len(TEXTS))]
RECORDS = [{"id": i, "text": t, "language": c} for i, t, c in zip(IDS, TEXTS, LANGUAGES, strict=True)]


def everything(start, stop):
    return True


def rows_of(source):
    found = list(NumberedRows(source, everything))
    assert [rows.start for rows in found] == [0, *(rows.stop for rows in found[:-1])]
    ids = [i for rows in found for i in rows.ids]
    items = [item for rows in found for item in rows.items]
    codes = [code for rows in found for code in rows.languages or [None] * len(rows)]
    return ids, items, codes


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table():
    return pa.Table.from_pylist(RECORDS)


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text", "language"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


def write_arrow_stream(path):
    with pa.ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)


def write_jsonl(path, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in RECORDS)


WRITERS = {
    "a.parquet": lambda p: pq.write_table(table(), p, row_group_size=2),
    "a.feather": lambda p: pyarrow.feather.write_feather(table(), p),
    "a.arrow": write_arrow_stream,
    "a.csv": write_csv,
    "a.tsv": lambda p: write_csv(p, "\t"),
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": lambda p: write_jsonl(p, gzip.open),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_and_lines_give_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = open_source(tmp_path / name)
    assert source.columns == Columns("id", "text", None, "language")
    assert source.modality is Modality.TEXT
    ids, items, codes = rows_of(source)
    assert ids == IDS
    assert [i for i in items if not isinstance(i, Problem)] == [t for t in TEXTS if t and t.strip()]
    kinds = {i: item.kind for i, item in enumerate(items) if isinstance(item, Problem)}
    assert kinds.keys() == {3, 4}
    assert kinds[4] == "empty-text"
    assert codes == [code or None for code in LANGUAGES]


def test_a_saved_dataset_is_read_without_its_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(RECORDS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    assert rows_of(open_source(tmp_path / "one"))[0] == IDS
    assert rows_of(open_source(tmp_path / "two" / "test"))[0] == IDS
    with pytest.raises(InputError, match="splits"):
        open_source(tmp_path / "two")


def test_images_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": png("red"), "path": None}]}, features).save_to_disk(
        tmp_path / "d"
    )
    source = open_source(tmp_path / "d")
    assert source.modality is Modality.IMAGE
    assert rows_of(source)[1] == [png("red")]


def test_a_text_file_has_a_text_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\n猫\nlast without an end".encode())
    ids, items, _ = rows_of(open_source(tmp_path / "a.txt"))
    assert [items[0], items[2], items[3]] == ["a cat", "猫", "last without an end"]
    assert items[1].kind == "empty-text"
    assert ids == [None] * 4


def test_a_tree_of_images_in_order_of_path(tmp_path):
    for name in ("b/2.jpg", "a/1.PNG", "c.webp", "a/notes.md", ".hidden/3.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png("blue"))
    (tmp_path / "a/notes.md").write_text("no image")
    source = open_source(tmp_path)
    ids, items, _ = rows_of(source)
    assert ids == ["a/1.PNG", "b/2.jpg", "c.webp"]
    assert items[0].read() == png("blue")


def test_pictures_of_every_suffix_are_rows_and_what_is_left_out_is_named(tmp_path):
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    files = {
        "a.ppm": png("red"),
        "b.JFIF": png("red"),
        "c.jpe": png("red"),
        "d.heic": heic,
        "e.jxl": b"\xff\x0a",
    }
    files |= {"f.heic": png("blue"), "g.nef": b"II*\0", "noext": b"", "h.jpg_large": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    assert source.notes == [
        "2 files of other formats were left out, such as h.jpg_large (suffixes: .jpg_large, none)"
    ]
    ids, items, _ = rows_of(source)
    assert ids == ["a.ppm", "b.JFIF", "c.jpe", "d.heic", "e.jxl", "f.heic", "g.nef"]
    assert "camera's raw file (.nef)" in items[-1].reason
    for item, name in zip(items, ("", "", "", "HEIC", "JPEG XL", ""), strict=False):
        if name:
            with pytest.raises(ImageError, match=f"it is {name}; supported formats"):
                decode(item.read())
        else:
            decode(item.read())
    for name in ("a.ppm", "b.JFIF", "c.jpe"):
        (tmp_path / name).unlink()
    assert rows_of(open_source(tmp_path))[0] == ["d.heic", "e.jxl", "f.heic", "g.nef"]
    (tmp_path / "a.csv").write_text("id,text\n1,a\n")
    assert open_source(tmp_path).format is SourceFormat.CSV


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_samples(tmp_path):
    tar_of(
        tmp_path / "0.tar",
        {
            "x/000.jpg": png("red"),
            "x/000.txt": b"um gato\n",
            "x/000.json": b'{"language": "pt"}',
            "x/001.txt": b"a dog",
        },
    )
    tar_of(tmp_path / "1.tar", {"002.png": png("green"), "002.txt": b"three"})
    ids, items, _ = rows_of(open_source(tmp_path))
    assert ids == ["x/000", "x/001", "002"]
    assert [items[0], items[2]] == [png("red"), png("green")]
    assert items[1].kind == "missing-file"
    source = open_source(tmp_path, columns=Columns(text="txt", language="language"))
    assert rows_of(source)[1:] == (["um gato", "a dog", "three"], ["pt", None, None])


def test_globs_urls_and_folders_of_files(tmp_path):
    import fsspec

    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    for i in range(3):
        pq.write_table(pa.table({"text": [f"{i}a", f"{i}b"]}), folder / f"{i}.parquet")
    memory = fsspec.filesystem("memory")
    memory.makedirs("/corpus", exist_ok=True)
    memory.pipe("/corpus/x.txt", b"one\ntwo\n")
    assert rows_of(open_source(folder))[1] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert rows_of(open_source(f"{folder}/[12].parquet"))[1] == ["1a", "1b", "2a", "2b"]
    assert rows_of(open_source(f"{tmp_path}/**/0.parquet"))[1] == ["0a", "0b"]
    assert rows_of(open_source(f"file://{folder}/1.parquet"))[1] == ["1a", "1b"]
    assert rows_of(open_source("memory://corpus/*.txt"))[1] == ["one", "two"]


def test_image_columns_of_bytes_structs_and_paths(tmp_path):
    (tmp_path / "here.png").write_bytes(png("red"))
    cells = {"bytes": png("red"), "path": None}, {"bytes": None, "path": "here.png"}, None
    pq.write_table(pa.table({"image": list(cells)}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"photo": ["here.png", str(tmp_path / "here.png"), "gone.png"]}), tmp_path / "b.parquet"
    )
    _, (data, file, none), _ = rows_of(open_source(tmp_path / "a.parquet"))
    assert data == png("red")
    assert file.read() == png("red")
    assert none.kind == "null-image"
    _, files, _ = rows_of(open_source(tmp_path / "b.parquet", columns=Columns(image="photo")))
    assert [f.read() for f in files[:2]] == [png("red")] * 2
    assert files[2].read().kind == "missing-file"


def test_lines_that_cannot_be_parsed_are_rows_of_their_own(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n3,three,more\n4,four\n")
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "te\n[3]\n{"id": 4, "text": 4}\n')
    ids, items, _ = rows_of(open_source(tmp_path / "a.csv"))
    assert (ids[0], items[0], ids[3], items[3]) == ("1", "one", "4", "four")
    assert [items[1].kind, items[2].kind] == ["malformed-row"] * 2
    ids, items, _ = rows_of(open_source(tmp_path / "a.jsonl"))
    assert (ids, items[0]) == ([1, None, None, 4], "one")
    assert [item.kind for item in items[1:]] == ["malformed-row", "malformed-row", "not-text"]


@pytest.mark.parametrize(
    ("items", "columns", "modality", "expected"),
    [
        (["a", "b"], Columns(), Modality.TEXT, ["a", "b"]),
        (iter(["a", 3]), Columns(), Modality.TEXT, ["a", "not-text"]),
        ([{"id": 7, "text": "a"}], Columns(), Modality.TEXT, ["a"]),
        ([{"legend": "a"}], Columns(text="legend"), Modality.TEXT, ["a"]),
        ([png("red"), None], Columns(), Modality.IMAGE, [png("red"), "null-image"]),
    ],
)
def test_iterables(items, columns, modality, expected):
    source = open_source(items, columns=columns)
    assert source.modality is modality
    _, found, _ = rows_of(source)
    assert [item.kind if isinstance(item, Problem) else item for item in found] == expected


class PolarsFrame:
    """Stand-in with polars' methods."""

    columns = ("id", "text", "language")

    def iter_rows(self, *, named):
        assert named
        return iter(RECORDS)


COLUMNS = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
TABLES = {
    "mapping of lists": lambda: COLUMNS,
    "mapping of arrays": lambda: {name: np.asarray(cells, object) for name, cells in COLUMNS.items()},
    "mapping of Arrow's columns": lambda: dict(zip(table().schema.names, table().columns, strict=True)),
    "table of Arrow": table,
    "record batch": lambda: table().to_batches()[0],
    "reader of record batches": lambda: table().to_reader(max_chunksize=2),
    "frame of pandas": lambda: pytest.importorskip("pandas").DataFrame(COLUMNS),
    "frame of polars": PolarsFrame,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_memory_gives_its_rows(name):
    source = open_source(TABLES[name]())
    assert source.columns == Columns("id", "text", None, "language")
    ids, items, codes = rows_of(source)
    assert ids == IDS
    assert [i for i in items if not isinstance(i, Problem)] == [t for t in TEXTS if t and t.strip()]
    assert codes == LANGUAGES


def test_a_column_of_arrow_is_its_values():
    assert rows_of(open_source(pa.chunked_array([["a"], ["b"]])))[1] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "of type NoneType; expected a path"),
        (5, "of type int; expected a path"),
        (b"png", "is bytes; pass a path"),
        (Image.new("RGB", (4, 4)), "is a single image; pass a list"),
        (np.zeros((4, 4, 3), np.uint8), "is a single image; pass a list"),
        ({"text": "a cat"}, "Column 'text' of the source is of type str; expected a list"),
        ({"text": iter("ab")}, "Column 'text' of the source is of type str_ascii_iterator; expected a list"),
        ({"text": ["a"], "id": [1, 2]}, "different lengths: {'text': 1, 'id': 2}"),
        ({"text": []}, "nothing to embed"),
        ([table()], "The first item is of type Table, a table"),
    ],
)
def test_what_is_no_source_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        open_source(source)


def test_images_of_an_iterable_may_be_opened_already(tmp_path):
    image, array = Image.new("RGB", (4, 4), "red"), np.zeros((4, 4, 3), np.uint8)
    _, items, _ = rows_of(open_source([image, array, tmp_path / "a.png", bytearray(b"png"), 3.5]))
    assert decode(items[0]).tobytes() == image.tobytes()
    assert decode(items[1]).tobytes() == array.tobytes()
    assert isinstance(items[2], ImageFile)
    assert items[3] == b"png"
    assert (items[4].kind, items[4].reason) == ("not-image", "The image is of type float.")


@pytest.mark.parametrize("are_mappings", [False, True])
def test_images_of_an_iterable_are_taken_one_by_one(are_mappings):
    """An iterator of frames gives one object again and again."""
    file = io.BytesIO()
    colours = [(i * 40, 0, 0) for i in range(6)]
    first, *others = [Image.new("RGB", (4, 4), colour) for colour in colours]
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True)
    frames = ImageSequence.Iterator(Image.open(file))
    source = ({"id": f"{i}", "image": frame} for i, frame in enumerate(frames)) if are_mappings else frames
    ids, items, _ = rows_of(open_source(source))
    assert [decode(item).getpixel((0, 0))[:3] for item in items] == colours
    if are_mappings:
        assert ids == [f"{i}" for i in range(6)]


def test_a_lazy_image_of_another_format_is_a_bad_row():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "QOI")
    _, items, _ = rows_of(open_source([Image.new("RGB", (4, 4)), Image.open(file)]))
    assert items[1].kind == "corrupt-image"
    assert "Image of row 1 has format QOI" in items[1].reason


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.xyz", b"", {}, "has no known suffix"),
        ("a.parquet", b"PAR1 no", {}, "cannot be read as parquet"),
        ("a.csv", b"", {}, "is empty"),
        ("a.csv", b"id,words\n", {}, "neither texts nor images"),
        ("a.csv", b"text,image\n", {}, "--text COLUMN or --image COLUMN"),
        ("a.csv", b"text\n", {"columns": Columns(id="key")}, "has no column 'key'"),
        ("a.tar", b"no tar" * 200, {}, "cannot be read as a tar"),
        ("a.txt", b"x", {"format": "yaml"}, "expected one of"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        rows_of(open_source(tmp_path / name, **options))


CSV_ROWS = 'id,text\n1,one\n2,"two\nlines"\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (CSV_ROWS + '3,"cut off\nin a field', 5),
        (CSV_ROWS + '3,"', 5),
        (CSV_ROWS + '3,"all but the quote\n', 5),
        (CSV_ROWS + '3,"a ""quote""', 5),
        ('id,"te', 1),
        ('"', 1),
    ],
)
def test_a_csv_file_that_ends_in_a_quoted_field_is_refused(tmp_path, content, line):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=rf"a\.csv, line {line}: a quoted field begins .* does not end"):
        rows_of(open_source(tmp_path / "a.csv"))


@pytest.mark.parametrize("end", ["3,three", '3,"three"', "3,three\n", '3,"three"\r\n\r\n', '3,"""three"""'])
def test_a_csv_file_may_end_without_a_newline(tmp_path, end):
    (tmp_path / "a.csv").write_text(CSV_ROWS + end)
    assert [item.strip('"') for item in rows_of(open_source(tmp_path / "a.csv"))[1]] == [
        "one",
        "two\nlines",
        "three",
    ]


@pytest.mark.parametrize("n_bytes", [1024, 1124, 2048])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_that_is_cut_off_between_files_is_refused(tmp_path, n_bytes, suffix):
    whole = tmp_path / "whole.tar"
    tar_of(whole, {f"{i}.txt": b"a cat" for i in range(4)})
    assert len(rows_of(open_source(whole))[1]) == 4
    cut = whole.read_bytes()[:n_bytes]
    (tmp_path / f"a.tar{suffix}").write_bytes(gzip.compress(cut) if suffix else cut)
    with pytest.raises(InputError, match="cannot be read as a tar"):
        rows_of(open_source(tmp_path / f"a.tar{suffix}"))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.txt.gz"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, name):
    lines = {"a.csv.gz": 'text\n"a cat"\n', "a.jsonl.gz": '{"text": "a cat"}\n', "a.txt.gz": "a cat\n"}
    content = gzip.compress(lines[name].encode() * 1000)
    (tmp_path / name).write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"cannot be read as .*Truncated compressed stream"):
        rows_of(open_source(tmp_path / name))


@pytest.mark.parametrize("blank", ["", " ", "\u3000\t"])
def test_a_blank_language_is_left_out_and_a_blank_text_is_a_bad_row(tmp_path, blank):
    pq.write_table(pa.table({"text": ["a cat", blank], "language": [blank, "en"]}), tmp_path / "a.parquet")
    _, items, codes = rows_of(open_source(tmp_path / "a.parquet"))
    assert codes == [None, "en"]
    assert items[1] == Problem(
        "empty-text",
        f"The text has blank characters only ({len(blank)})." if blank else "The text is empty.",
    )


@pytest.mark.parametrize("location", ["f\udcff.txt", "f\udcff/*.txt", "g\udcff"])
def test_a_location_that_is_not_utf_8_is_named(tmp_path, location):
    with pytest.raises(InputError, match=r"The name .*\\xff.* is not UTF-8\. Rename it"):
        open_source(f"{tmp_path}/{location}")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("location", ["", "/*.txt"])
def test_a_file_in_a_folder_whose_name_is_not_utf_8_is_named(tmp_path, location):
    (tmp_path / "good.txt").write_text("a cat")
    (tmp_path / "bad\udcff.txt").write_text("a cat")
    with pytest.raises(
        DamagedFileError, match=r"holds a file whose name is not UTF-8: bad\\xff\.txt\. Rename it"
    ):
        open_source(f"{tmp_path}{location}")
    source = open_source(f"{tmp_path}{location}", reading=Reading(skip_bad_files=True))
    assert rows_of(source)[1] == ["a cat"]
    assert [(bad.name, bad.n_rows_read) for bad in source.bad_files] == [("bad\\xff.txt", 0)]
    if location:
        return
    for name in ("a\udcff.jpg", "b.png", "c\udcff.md"):
        (tmp_path / name).write_bytes(png("red"))
    (tmp_path / "good.txt").unlink()
    with pytest.raises(DamagedFileError, match=r"a\\xff\.jpg"):
        open_source(tmp_path, format="images")
    source = open_source(tmp_path, format="images", reading=Reading(skip_bad_files=True))
    assert rows_of(source)[0] == ["b.png"]
    assert [bad.name for bad in source.bad_files] == ["a\\xff.jpg"]


def test_nothing_there_and_several_formats(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "gone.parquet")
    with pytest.raises(InputError, match="No file matches"):
        open_source(f"{tmp_path}/*.parquet")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"several formats: \['csv', 'text'\]"):
        open_source(tmp_path)
    assert rows_of(open_source(tmp_path, format=SourceFormat.CSV))[1] == ["a"]
    with pytest.raises(InputError, match="texts or images"):
        Columns(text="a", image="b")


def test_rows_that_are_not_needed_are_not_read(tmp_path):
    pq.write_table(
        pa.table({"text": [str(i) for i in range(100)]}), tmp_path / "a.parquet", row_group_size=10
    )
    rows = NumberedRows(open_source(tmp_path / "a.parquet"), lambda start, stop: start < 57 and stop > 55)
    assert [(piece.start, piece.stop) for piece in rows] == [(50, 60)]
    assert rows.n_rows == 100


@pytest.mark.parametrize("pieces", [[100], [1] * 100, [33, 33, 34], [7, 0, 93]])
def test_slices_do_not_depend_on_the_pieces(pieces):
    def source():
        start = 0
        for n in pieces:
            yield Rows(start, [None] * n, list(range(start, start + n)))
            start += n

    slices = list(slices_from_rows(source(), size=8, boundary=20))
    assert [(s.start, s.stop) for s in slices[:4]] == [(0, 8), (8, 16), (16, 20), (20, 28)]
    assert [item for s in slices for item in s.items] == list(range(100))
