"""Results are shown as what they were: texts and images are found again by their ids, in every source."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import options
from PIL import Image
from typer.testing import CliRunner

from runtime.commands.app import app
from runtime.corpus import embed_corpus, open_source
from runtime.corpus.lookup import items_of_ids
from runtime.corpus.rows import Columns
from runtime.errors import InputError
from runtime.search.pictures import pictures_of_ids

TEXTS = ["um gato preto", "a red house", "", "猫 & <b>"]


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def written(folder, suffix):
    path = folder / f"a.{suffix}"
    ids = [f"t{i}" for i in range(len(TEXTS))]
    if suffix == "parquet":
        pq.write_table(pa.table({"id": ids, "text": TEXTS}), path)
    elif suffix == "csv":
        path.write_text("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in zip(ids, TEXTS, strict=True)))
    else:
        rows = [json.dumps({"id": i, "text": t}) + "\n" for i, t in zip(ids, TEXTS, strict=True)]
        path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_texts_are_found_by_their_ids(tmp_path, suffix):
    source = open_source(written(tmp_path, suffix))
    assert items_of_ids(source, ["t3", "t0", "t2", "nothing"]) == {"t3": TEXTS[3], "t0": TEXTS[0]}


def test_rows_without_ids_are_found_by_their_numbers(tmp_path):
    for name in ("0.txt", "1.txt"):
        (tmp_path / name).write_text("one\ntwo\nthree\n")
    assert items_of_ids(open_source(tmp_path), ["1", "3", "9"]) == {"1": "two", "3": "one"}


def test_items_of_python_are_found(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    (found,) = items_of_ids(open_source([image], columns=Columns(image="image")), ["0"]).values()
    assert Image.open(io.BytesIO(found)).getpixel((0, 0)) == (255, 0, 0)


def test_pictures_come_out_of_tars(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"a.png": png("red"), "a.txt": b"one", "b.png": png("blue")}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pictures_of_ids(path, ["b", "c"]) == {"b": png("blue")}
    assert pictures_of_ids(tmp_path, ["a"]) == {"a": png("red")}
    (tmp_path / "0.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match="not a source of images: it has texts"):
        pictures_of_ids(tmp_path / "0.jsonl", ["0"])


def test_a_search_prints_what_the_texts_say(exported, tmp_path):
    model, source = exported("nllb-clip"), written(tmp_path, "jsonl")
    embed_corpus(model, source, tmp_path / "vectors", options())

    def search(*arguments):
        words = ["search", model, tmp_path / "vectors", "gato", "--language", "por_Latn", "--threads", 1]
        return CliRunner().invoke(app, [str(word) for word in (*words, *arguments)])

    shown = search("--texts", source)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0].endswith("  t0  um gato preto")
    (first, *_) = json.loads(search("--texts", source, "--json").stdout)
    assert (first["id"], first["text"]) == ("t0", "um gato preto")
    page = tmp_path / "page.html"
    assert search("--texts", source, "--html", page).exit_code == 0
    assert "猫 &amp; &lt;b&gt;" in page.read_text(encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text("one\n")
    assert "has none of the 3 texts found" in " ".join(search("--texts", other).stderr.split())
    assert "Pass --texts SOURCE as well" in " ".join(search("--text-column", "text").stderr.split())
