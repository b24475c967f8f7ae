"""Columns that are kept reach vectors, index and answers; other programs read the folder as it is."""

from __future__ import annotations

import datetime
import decimal
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import options, parts_of, sentences
from sample_models import Exported
from typer.testing import CliRunner

from runtime.commands.app import app
from runtime.corpus import Shard, embed_corpus
from runtime.errors import InputError
from runtime.indexes import VectorIndex, index_from_vectors

N_ROWS = 300


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of small row groups, with two bad rows."""
    folder = tmp_path_factory.mktemp("source")
    texts = sentences(N_ROWS)
    texts[70] = texts[200] = None
    table = pa.table(
        {
            "id": [f"t{i}" for i in range(N_ROWS)],
            "url": [None if i % 50 == 3 else f"https://example.org/{i}" for i in range(N_ROWS)],
            "width": pa.array(range(N_ROWS), pa.int32()),
            "text": texts,
        }
    )
    for number, (start, stop) in enumerate([(0, 110), (110, 130), (130, N_ROWS)]):
        pq.write_table(table.slice(start, stop - start), folder / f"{number}.parquet", row_group_size=17)
    return folder


@pytest.fixture(scope="module")
def folder(model, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "out"
    embed_corpus(model, source, out, options(keep=("width", "url")))
    return out


def test_kept_columns_stand_beside_the_vectors_of_their_rows(folder):
    table = pa.concat_tables(pq.read_table(path) for path in parts_of(folder))
    assert table.column_names == ["id", "width", "url", "vector"]
    assert table.schema.field("width").type == pa.int32()
    good = [i for i in range(N_ROWS) if i not in (70, 200)]
    assert table["id"].to_pylist() == [f"t{i}" for i in good]
    assert table["width"].to_pylist() == good
    assert table["url"].to_pylist() == [None if i % 50 == 3 else f"https://example.org/{i}" for i in good]


def test_shards_and_resumed_runs_keep_the_same(model, source, folder, tmp_path):
    for index in (1, 0, 2):
        embed_corpus(model, source, tmp_path, options(keep=("width", "url"), shard=Shard(index, 3)))
    for path in parts_of(folder):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("names", "message"),
    [(("colour",), "has no column 'colour' to keep; it has"), (("id",), "cannot be kept under this name")],
)
def test_what_cannot_be_kept_is_an_error_before_anything_is_written(model, source, tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        embed_corpus(model, source, tmp_path / "out", options(keep=names))
    assert not (tmp_path / "out").exists()


def test_hive_partitions_are_kept(model, tmp_path):
    texts = sentences(60)
    for number, lang in enumerate(("pt", "en", "__HIVE_DEFAULT_PARTITION__")):
        part = tmp_path / "in" / f"lang={lang}"
        part.mkdir(parents=True)
        own = texts[20 * number : 20 * number + 20]
        table = pa.table({"id": [f"{lang}{i}" for i in range(20)], "text": own, "n": range(20)})
        pq.write_table(table, part / "p.parquet", row_group_size=7)
    expected = [None] * 20 + ["en"] * 20 + ["pt"] * 20
    for keep in (("lang",), ("n", "lang")):
        out = tmp_path / "-".join(keep)
        embed_corpus(model, tmp_path / "in", out, options(keep=keep, rows_per_part=17))
        table = pa.concat_tables(pq.read_table(path) for path in parts_of(out))
        assert table["lang"].to_pylist() == expected
        assert [i[:2] for i in table["id"].to_pylist()] == ["__"] * 20 + ["en"] * 20 + ["pt"] * 20
    assert table["n"].to_pylist() == [*range(20)] * 3


def test_only_tables_have_columns_to_keep(model, tmp_path):
    (tmp_path / "a.csv").write_text("text,url\na,b\n")
    with pytest.raises(InputError, match=r"but .* is csv\. Convert it to Parquet"):
        embed_corpus(model, tmp_path / "a.csv", tmp_path / "out", options(keep=("url",)))


@pytest.mark.parametrize("indexed", [False, True])
def test_search_shows_kept_columns_and_filters_by_them(model, folder, tmp_path, indexed):
    place = folder
    if indexed:
        place = tmp_path / "index"
        result = CliRunner().invoke(app, ["index", str(folder), "--out", str(place), "--threads", "1"])
        assert result.exit_code == 0, result.output
    asked = ["search", str(model), str(place), "red house", "--language", "en", "-k", "4"]
    result = CliRunner().invoke(app, [*asked, "--where", "width<50", "--where", "url!=https://example.org/7"])
    assert result.exit_code == 0, result.output
    assert "width=" in result.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--where", "width < 50", "--json"]).stdout)
    assert len(found) == 4
    for hit in found:
        assert hit["kept"]["width"] < 50
        assert hit["id"] == f"t{hit['kept']['width']}"
    wrong = CliRunner().invoke(app, [*asked, "--where", "height<50"])
    assert (wrong.exit_code, "no column 'height'" in wrong.output) == (1, True)
    wrong = CliRunner().invoke(app, [*asked, "--where", "width<many"])
    assert (wrong.exit_code, "cannot be compared with 'many'" in wrong.output) == (1, True)


def vectors_of(rows) -> np.ndarray:
    return np.asarray([list(row) for row in rows], dtype=np.float32)


def read_by_pandas(folder):
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(folder)
    return list(table["id"]), vectors_of(table["vector"])


def read_by_polars(folder):
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(f"{folder}/*.parquet")
    return table["id"].to_list(), table["vector"].to_numpy()


def read_by_duckdb(folder):
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"SELECT id, vector FROM '{folder}/*.parquet'").fetchall()
    return [row[0] for row in rows], vectors_of(row[1] for row in rows)


def read_by_datasets(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    return rows["id"][:], vectors_of(rows["vector"])


def read_by_arrow(folder):
    dataset = pytest.importorskip("pyarrow.dataset")
    table = dataset.dataset(str(folder)).to_table()
    return table["id"].to_pylist(), vectors_of(table["vector"].to_pylist())


def read_by_daft(folder):
    daft = pytest.importorskip("daft")
    rows = daft.read_parquet(f"{folder}/*.parquet").to_pydict()
    return rows["id"], vectors_of(rows["vector"])


@pytest.mark.parametrize(
    "read",
    [read_by_pandas, read_by_polars, read_by_duckdb, read_by_datasets, read_by_arrow, read_by_daft],
    ids=lambda read: read.__name__.removeprefix("read_by_"),
)
def test_other_programs_read_the_folder(folder, read):
    assert (folder / "_bad-rows").is_dir()
    ids, vectors = read(folder)
    expected = pa.concat_tables(pq.read_table(path) for path in parts_of(folder))
    order = np.argsort([int(one[1:]) for one in ids])  # a reader of several files may mix them
    assert [ids[i] for i in order] == expected["id"].to_pylist()
    np.testing.assert_array_equal(vectors[order], vectors_of(expected["vector"].to_pylist()))


@pytest.fixture(scope="module")
def typed(model, tmp_path_factory):
    """Vectors with kept columns of many types, and integers as ids."""
    folder = tmp_path_factory.mktemp("typed")
    moment = datetime.datetime(2020, 5, 17, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "id": pa.array([1, 2, 3, (1 << 53) + 1]),
        "text": ["a cat", "a dog", "a cow", "a bird"],
        "n": pa.array([1, 2, 3, None], pa.int32()),
        "share": pa.array([float("nan"), 0.5, float("inf"), None]),
        "day": pa.array([datetime.date(2020, 1, day) for day in (1, 2, 3, 4)]),
        "at": pa.array(
            [moment + datetime.timedelta(hours=i) for i in range(4)], pa.timestamp("us", "+02:00")
        ),
        "price": pa.array([decimal.Decimal("1.50")] * 4),
        "data": pa.array([b"\xff\x00"] * 4),
        "took": pa.array([1500] * 4, pa.duration("ms")),
        "pair": pa.array([{"a": 1, "t": datetime.date(2020, 1, 1)}] * 4),
        "tags": pa.array([[1.0, float("nan")], None, [], []]),
        "map": pa.array([[("k", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
        "kind": pa.array([" sp ", "sp", "x", "x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), folder / "a.parquet")
    keep = tuple(name for name in columns if name not in ("id", "text"))
    embed_corpus(model, folder / "a.parquet", folder / "out", options(keep=keep))
    index_from_vectors(folder / "out", folder / "index", threads=1)
    return folder


def answers(model, *arguments):
    done = CliRunner().invoke(
        app, ["search", str(model), *map(str, arguments), "--language", "en", "-k", "9", "--json"]
    )
    assert done.exit_code == 0, done.output

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return {hit["id"]: hit.get("kept") for hit in json.loads(done.stdout, parse_constant=refuse)}


@pytest.mark.parametrize("place", ["out", "index"])
def test_answers_are_json_of_every_type(model, typed, place):
    found = answers(model, typed / place, "a cat")
    assert set(found) == {1, 2, 3, (1 << 53) + 1}
    assert found[1] == {
        "n": 1,
        "share": None,
        "day": "2020-01-01",
        "at": "2020-05-17T14:30:00+02:00",
        "price": "1.50",
        "data": "/wA=",
        "took": 1.5,
        "pair": {"a": 1, "t": "2020-01-01"},
        "tags": [1.0, None],
        "map": [["k", 1]],
        "kind": " sp ",
    }
    assert (found[2]["share"], found[3]["share"], found[2]["tags"]) == (0.5, None, None)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("n>2.5", {3}),
        ("n<=2.5", {1, 2}),
        ("n>=1.5", {2, 3}),
        ("n<1.5", {1}),
        ("n=2.0", {2}),
        ("n=2.5", set()),
        ("n!=2.5", {1, 2, 3}),
        ("n<1e1000000", {1, 2, 3}),
        ("n>1e20", set()),
        ("n>-1e20", {1, 2, 3}),
        ("kind= sp ", {2}),
        ("kind=' sp '", {1}),
        ('kind != "x"', {1, 2}),
        ("at>=2020-05-17T15:30:00", {2, 3, (1 << 53) + 1}),
        ("at>=2020-05-17T14:30:00Z", {3, (1 << 53) + 1}),
        ("day<2020-01-03", {1, 2}),
        ("price=1.5", {1, 2, 3, (1 << 53) + 1}),
    ],
)
def test_conditions_are_compared_as_the_column_is(model, typed, condition, expected):
    assert answers(model, typed / "out", "a cat", "-w", condition).keys() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "There is no image file missing.jpg"),
        (["  "], "The query is empty"),
        (["a cat", "-q", "pt= "], "Invalid --query"),
        (["a cat", "-w", "n>two"], "cannot be compared with 'two'"),
        (["a cat", "-w", "n>nan"], "cannot be compared with 'nan'"),
    ],
)
def test_a_query_that_means_nothing_is_refused(model, typed, arguments, message):
    done = CliRunner().invoke(app, ["search", str(model), str(typed / "out"), *arguments, "--language", "en"])
    assert (done.exit_code, message in done.output) == (1, True), done.output


def test_a_text_that_looks_like_a_picture_and_a_url_are_said_aloud(model, typed):
    assert answers(model, typed / "out", "missing.jpg", "--literal")
    done = CliRunner().invoke(app, ["search", str(model), "s3://bucket/vectors", "a cat"])
    assert (done.exit_code, "s3://bucket/vectors is a URL" in done.output) == (1, True)


def test_ids_to_remove_are_read_as_written_and_unknown_ones_named(typed, tmp_path):
    shutil.copytree(typed / "index", tmp_path / "index")
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf1\r\n\r\n02\r\n \n3\nx\n")
    arguments = ["index", str(typed / "out"), "--out", str(tmp_path / "index"), "--update", "--remove"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "ids.txt")])
    assert done.exit_code == 0, done.output
    assert "2 removed; 2 ids to remove are not in it: '02', 'x'" in done.output
    with VectorIndex.open(tmp_path / "index") as index:
        assert len(index) == 2
