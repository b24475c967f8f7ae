"""Measurements of immich's folder: on a sample, and as a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from sample_models import CHECKPOINTS
from tokenizers import Tokenizer

from bench.models.immich_models import tokenizer_of_true_size
from bench.records.record import Record, record_of
from bench.reporting.immich_table import immich_table, missed_targets
from bench.timing.immich_queries import opening_of, turns_of
from export.checkpoint import towers_from_checkpoint
from export.graphs.files import copy_graph
from export.layouts.names import LayoutName
from export.layouts.publish import RECORD_FILE, layout_for_timing
from export.repository import ExportOptions, drafted
from export.variants import forms_for
from runtime.manifest import Engine, Modality, Precision

MEDIANS = {
    "disk": 515.0,
    "resident": 700.0,
    "resident text": 500.0,
    "load cpu": 0.9,
    "first cpu": 1.0,
    "first wall": 0.8,
    "query wall": 10.0,
    "query cpu": 20.0,
    "plain wall": 200.0,
    "plain cpu": 400.0,
}


def records(**changes: float) -> list[Record]:
    key = {"model": "nllb-clip-base-siglip", "precision": "int8"}
    found = [
        record_of({"immich": metric, **key}, [value] * 3, unit="MB", settings={})
        for metric, value in {**MEDIANS, **{k.replace("_", " "): v for k, v in changes.items()}}.items()
    ]
    lost = {"immich": "recall lost", "model": "nllb-siglip-mrl", "precision": "int8"}
    return [*found, record_of(lost, [0.2, 0.31], unit="points", settings={})]


def test_the_table_shows_medians_and_the_recall_of_the_worse_direction() -> None:
    last = immich_table(records()).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:4] == ["`nllb-clip-base-siglip`", "INT8", "515", "700"]
    assert cells[-2:] == ["0.050", "0.31"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"resident": 1_200.0}, "1,200 MB resident"),
        ({"first_cpu": 1.7}, "first answer takes 1.70"),
        ({"query_cpu": 60.0}, "0.150 of a plain FP32 export"),
    ],
)
def test_a_missed_target_is_named(changes: dict[str, float], message: str | None) -> None:
    missed = missed_targets(records(**changes))
    assert (missed == []) if message is None else (message in missed[0] and len(missed) == 1)


@pytest.fixture(scope="module")
def folder_and_plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("immich")
    towers = towers_from_checkpoint(CHECKPOINTS / "nllb-clip")
    forms = forms_for([Precision.FP32], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME])
    options, name = ExportOptions(forms=forms), "nllb-clip-base-siglip__v1"
    done = layout_for_timing(towers, work / "cache", LayoutName.IMMICH, name=name, options=options)
    plain = work / "plain" / "model.onnx"
    plain.parent.mkdir()
    with drafted(towers, work / "other", name="plain", options=options, measured=False) as draft:
        copy_graph(draft.graph(Modality.TEXT), plain)
    return done.folder, plain


def test_a_folder_is_measured_as_its_service_uses_it(folder_and_plain: tuple[Path, Path]) -> None:
    folder, plain = folder_and_plain
    opening = opening_of(folder)
    assert all(value > 0 for value in dataclasses.asdict(opening).values())
    assert opening.resident_bytes > opening.text_resident_bytes
    assert opening.first_cpu_s > opening.load_cpu_s
    timed = turns_of(folder, plain, turns=4)
    assert [len(times) for times in dataclasses.astuple(timed)] == [4] * 4


def test_a_model_for_timing_says_that_nothing_was_measured(folder_and_plain: tuple[Path, Path]) -> None:
    record = json.loads((folder_and_plain[0] / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["parity"] == {"measured": "nothing: the weights are random"}


def test_a_tokenizer_grows_to_a_published_size_and_keeps_its_ids() -> None:
    own = (CHECKPOINTS / "nllb-clip" / "tokenizer.json").read_text(encoding="utf-8")
    small, large = Tokenizer.from_str(own), Tokenizer.from_str(tokenizer_of_true_size(own, 60_000))
    assert large.get_vocab_size(with_added_tokens=False) == 60_000
    assert small.get_vocab().items() <= large.get_vocab().items()
