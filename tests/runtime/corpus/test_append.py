"""A source that grows: new files become new parts, and the folder is that of a run over all files."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_runs import bytes_of, options, parts_of, sentences, write_texts
from sample_models import Exported

from runtime.corpus import embed_corpus
from runtime.errors import CorpusError
from runtime.indexes import VectorIndex, index_from_vectors
from runtime.indexes.update import update_index

TEXTS = sentences(400)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


def grown(folder: Path, number: int, start: int, stop: int) -> Path:
    folder.mkdir(exist_ok=True)
    ids = [f"t{i}" for i in range(start, stop)]
    write_texts(folder / f"{number}.parquet", TEXTS[start:stop], id=ids)
    return folder


def test_added_files_become_parts_and_the_index_follows(model, tmp_path):
    source = grown(tmp_path / "in", 1, 0, 150)
    embed_corpus(model, source, tmp_path / "out", options())
    index_from_vectors(tmp_path / "out", tmp_path / "index", threads=1)
    before = {path.name: path.read_bytes() for path in parts_of(tmp_path / "out")}
    grown(source, 2, 150, 160)
    grown(source, 3, 160, 400)
    with pytest.raises(CorpusError, match=r"added: .*2\.parquet.*--append"):
        embed_corpus(model, source, tmp_path / "out", options())
    record = embed_corpus(model, source, tmp_path / "out", options(append=True))
    assert (record.total.rows, record.this_run.rows) == (400, 400 - 128)
    embed_corpus(model, source, tmp_path / "whole", options())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    after = {path.name: path.read_bytes() for path in parts_of(tmp_path / "out")}
    assert {name for name in before if before[name] == after[name]} == {
        "part-00000.parquet",
        "part-00001.parquet",
    }
    assert embed_corpus(model, source, tmp_path / "out", options()).this_run.rows == 0
    change = update_index(tmp_path / "index", tmp_path / "out", threads=1)
    assert (change.added, change.removed) == (400 - 128, 150 - 128)
    with VectorIndex.open(tmp_path / "index") as index:
        assert len(index) == 400


def test_a_file_that_sorts_before_the_others_is_named(model, tmp_path):
    source = grown(tmp_path / "in", 5, 0, 100)
    embed_corpus(model, source, tmp_path / "out", options())
    grown(source, 4, 100, 150)
    with pytest.raises(CorpusError, match=r"4\.parquet was added .* sorts before 5\.parquet.*sort last"):
        embed_corpus(model, source, tmp_path / "out", options(append=True))
    (source / "4.parquet").unlink()
    grown(source, 5, 0, 90)
    grown(source, 6, 100, 150)
    with pytest.raises(CorpusError, match=r"changed: 5\.parquet"):
        embed_corpus(model, source, tmp_path / "out", options(append=True))
