"""Columns that are kept reach vectors, index and answers; other programs read the folder as it is."""

from __future__ import annotations

import json
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
