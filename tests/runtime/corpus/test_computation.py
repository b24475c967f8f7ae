"""One computation a corpus: another graph, engine or processor does not go on with it unasked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from corpus_runs import BY_HAND, bytes_of, journal_of, options, output_of, sentences, write_texts
from sample_models import Exported

from runtime.corpus import Options, Shard, computation, embed_corpus
from runtime.corpus import run as run_module
from runtime.corpus.computation import ComputationChange, computation_of, differences, require_acceptable
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.manifest import Modality

N_ROWS = 300


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("capivara")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("rows") / "texts.parquet", sentences(N_ROWS))


def stopped(model: Path, source: Path, folder: Path, **changes: Any) -> Options:
    """Embed, and lose the last part, so that the run is not finished."""
    chosen = options(**changes)
    embed_corpus(model, source, folder, chosen)
    sorted(folder.glob("part-*.parquet"))[-1].unlink()
    return chosen


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the machine be another."""
    honest = computation.computation_of

    def changed(*arguments: Any) -> Any:
        return {**honest(*arguments), **changes}

    monkeypatch.setattr(run_module, "computation_of", changed)


OTHERS = {
    "engine": ({"engine": "onnxruntime 0.1"}, "engine was 'onnxruntime 1.* is now 'onnxruntime 0.1'"),
    "cpu": ({"cpu": "Another: avx2"}, "cpu was .* is now 'Another: avx2'"),
    "libraries": ({"libraries": "tokenizers 0"}, "libraries was .*'tokenizers 0'"),
    "graphs": ({"graphs": {"model.onnx": "ab" * 32}}, "model.onnx had sha256 .* now has abababababab"),
}


def test_the_journal_says_what_computes(model: Path, source: Path, tmp_path: Path) -> None:
    record = embed_corpus(model, source, tmp_path, options())
    entries = journal_of(tmp_path)
    (noted,) = [entry["computation"] for entry in entries if isinstance(entry.get("computation"), dict)]
    assert [entry["journal"] for entry in entries if "arguments" in entry] == [3]
    assert [*noted["graphs"]] == ["model.onnx", "tokenizer.json"]
    assert noted["engine"].startswith("onnxruntime 1.")
    assert noted["cpu"].count(":") == 1
    assert "tokenizers" in noted["libraries"]
    assert record.computations == (noted,)
    assert record.notes == ()


@pytest.mark.parametrize("what", OTHERS)
def test_another_computation_does_not_go_on(
    what: str, model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = stopped(model, source, tmp_path)
    before = bytes_of(tmp_path)
    elsewhere(monkeypatch, **OTHERS[what][0])
    with pytest.raises(CorpusError, match=f"(?s){OTHERS[what][1]}.*another output folder") as refusal:
        embed_corpus(model, source, tmp_path, chosen)
    assert (f"--accept-changed {what} resumes anyway" in str(refusal.value)) is (what != "graphs")
    assert bytes_of(tmp_path) == before
    every = dataclasses.replace(chosen, accept_changed=tuple(ComputationChange))
    if what == "graphs":
        with pytest.raises(CorpusError, match="sha256"):
            embed_corpus(model, source, tmp_path, every)
        return
    record = embed_corpus(
        model, source, tmp_path, dataclasses.replace(chosen, accept_changed=(ComputationChange(what),))
    )
    assert len(record.computations) == 2
    assert f"computation changed between parts, as accepted: {what} was" in record.notes[0]
    (tmp_path / "part-00000.parquet").unlink()
    embed_corpus(model, source, tmp_path, chosen)  # accepted once, it need not be again


def test_what_is_finished_is_not_asked(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_corpus(model, source, tmp_path, options())
    elsewhere(monkeypatch, cpu="another", graphs={})
    assert embed_corpus(model, source, tmp_path, options()).this_run.rows == 0


def test_shards_of_one_folder_are_computed_alike(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_corpus(model, source, tmp_path, options(shard=Shard(0, 3)))
    elsewhere(monkeypatch, cpu="another")
    with pytest.raises(CorpusError, match="cpu was"):
        embed_corpus(model, source, tmp_path, options(shard=Shard(1, 3)))
    embed_corpus(model, source, tmp_path, options(shard=Shard(1, 3), accept_changed=(ComputationChange.CPU,)))
    embed_corpus(model, source, tmp_path, options(shard=Shard(2, 3)))
    assert len(output_of(tmp_path)[0]) == N_ROWS


def test_a_folder_of_before_is_refused_and_says_the_remedy(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "journal-0-of-2.jsonl").write_text('{"journal": 2, "arguments": {}}\n')
    with pytest.raises(CorpusError, match=r"-0-of-2.jsonl is a journal of an older babeltower.*another"):
        embed_corpus(model, source, tmp_path, options())
    assert [path.name for path in tmp_path.iterdir()] == ["journal-0-of-2.jsonl"]


def test_a_computation_that_made_nothing_is_forgotten(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise CorpusError("stopped before the first part")

    with pytest.raises(CorpusError, match="before the first part"):
        embed_corpus(model, source, tmp_path, options(), execute=fails)
    elsewhere(monkeypatch, cpu="another")
    record = embed_corpus(model, source, tmp_path, options())
    assert [found["cpu"] for found in record.computations] == ["another"]


def test_a_fingerprint_of_the_former_kind_is_said_to_be_one(
    model: Path, source: Path, tmp_path: Path
) -> None:
    chosen = stopped(model, source, tmp_path)
    for path in (tmp_path / "_journal").glob("run.*.json"):
        entry = json.loads(path.read_text())
        if "arguments" in entry:
            entry["arguments"]["fingerprint"] = "bt1-" + "0" * 32
            path.write_text(json.dumps(entry))
    with pytest.raises(CorpusError, match=r"fingerprint was 'bt1-.*former kind.*Embed them again"):
        embed_corpus(model, source, tmp_path, chosen)


def test_both_towers_have_graphs_of_their_own(model: Path) -> None:
    with Encoder.open(model) as encoder:
        text, image = (computation_of(encoder, BY_HAND, modality) for modality in Modality)
    assert {*differences(text, image)} == {"graphs", "libraries"}
    with pytest.raises(CorpusError, match="Another worker holds vectors"):
        require_acceptable([text], image, tuple(ComputationChange), holder="Another worker")
