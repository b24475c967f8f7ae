"""Comparing two runs: what is worse is found, what is noise is not, and unlike runs are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.compare import app, compare_runs
from bench.records.changes import Outcome, changes_of_records, changes_of_retrieval, judged
from bench.records.record import Record, record_of, suite_cell, write_records
from bench.records.statistics import chance_of_binomial, chance_of_ratio, discoveries
from runtime.errors import BabeltowerError

N_CELLS, N_PROCESSES, N_SAMPLES = 40, 4, 12


def run_of(seed: int, *, slower: dict[int, float] | None = None, unit: str = "ms") -> list[Record]:
    """Cells whose processes differ by 2% and whose samples by 4%."""
    random = np.random.default_rng(seed)
    records = []
    for i in range(N_CELLS):
        shape = (N_PROCESSES, N_SAMPLES)
        noise = random.normal(0, 0.02, (N_PROCESSES, 1)) + random.normal(0, 0.04, shape)
        values = (1 + i) * np.exp(noise) * (slower or {}).get(i, 1.0)
        cell = suite_cell(suite="latency", metric="wall", model="m", batch=i)
        processes = [N_SAMPLES] * N_PROCESSES
        records.append(record_of(cell, values.ravel().tolist(), unit=unit, settings={}, processes=processes))
    return records


def written(path: Path, records: list[Record]) -> Path:
    write_records(records, path)
    return path


def compared(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_regression_of_a_fifth_is_found_and_an_improvement_listed(tmp_path: Path) -> None:
    old = written(tmp_path / "old.json", run_of(1))
    new = written(tmp_path / "new.json", run_of(2, slower={7: 1.2, 9: 0.7}))
    result = compared(old, new, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "1 worse, 1 better, 38 same" in result.stdout
    changes = json.loads((tmp_path / "out.json").read_text())["changes"]
    assert changes[0]["outcome"] == "worse"
    assert "batch 7" in changes[0]["name"]
    assert changes[0]["interval"]["low"] > 1.05


def test_noise_raises_no_alarm(tmp_path: Path) -> None:
    n_alarms, n_repeats = 0, 20
    old = written(tmp_path / "old.json", run_of(1))
    for seed in range(n_repeats):
        new = written(tmp_path / "new.json", run_of(100 + seed))
        n_alarms += any(change.outcome is not Outcome.SAME for change in compare_runs(old, new))
    assert n_alarms <= 0.1 * n_repeats  # one in twenty is expected


@pytest.mark.parametrize(
    ("unit", "factor", "exit_code"), [("ms", 0.6, 0), ("rows/s", 0.6, 1), ("rows/s", 1.6, 0), ("MB", 1.6, 1)]
)
def test_the_unit_says_which_way_is_worse(tmp_path: Path, unit: str, factor: float, exit_code: int) -> None:
    old = written(tmp_path / "old.json", run_of(1, unit=unit))
    new = written(tmp_path / "new.json", run_of(2, unit=unit, slower={3: factor}))
    assert compared(old, new).exit_code == exit_code


def test_a_change_within_the_tolerance_is_none(tmp_path: Path) -> None:
    old = written(tmp_path / "old.json", run_of(1))
    new = written(tmp_path / "new.json", run_of(2, slower={3: 1.3}))
    assert compared(old, new, "--tolerance", "50").exit_code == 0
    assert compared(old, new, "--tolerance", "0").exit_code == 1


def test_cells_that_are_missing_new_or_failed(tmp_path: Path) -> None:
    records = run_of(1)
    old = written(tmp_path / "old.json", records)
    fewer = written(tmp_path / "fewer.json", records[1:])
    assert compared(old, fewer).exit_code == 1
    assert "1 missing" in compared(old, fewer, "--allow-missing").stdout
    assert compared(old, fewer, "--allow-missing").exit_code == 0
    assert compared(fewer, old).exit_code == 0
    failed = dataclasses.replace(records[0], samples=(), processes=(), error="no such engine")
    result = compared(old, written(tmp_path / "failed.json", [failed, *records[1:]]))
    assert result.exit_code == 1
    assert "no such engine" in result.stdout


@pytest.mark.parametrize("what", ["machine", "versions"])
def test_unlike_environments_are_refused(tmp_path: Path, what: str) -> None:
    records = run_of(1)
    old = written(tmp_path / "old.json", records)
    other = {what: {**getattr(records[0], what), "numpy" if what == "versions" else "cpu": "other"}}
    new = written(tmp_path / "new.json", [dataclasses.replace(record, **other) for record in records])
    with pytest.raises(BabeltowerError, match=r"other.*--different-environments"):
        compare_runs(old, new)
    assert compared(old, new, "--different-environments").exit_code == 0


def test_the_commit_may_differ(tmp_path: Path) -> None:
    records = run_of(1)
    new = [dataclasses.replace(record, commit="another") for record in records]
    result = compared(written(tmp_path / "old.json", records), written(tmp_path / "new.json", new))
    assert result.exit_code == 0


def test_what_holds_no_records_is_refused(tmp_path: Path) -> None:
    old = written(tmp_path / "old.json", run_of(1))
    (tmp_path / "broken.json").write_text('{"schema": 2, "cells": [')
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "broken.json", tmp_path / "empty", tmp_path / "none.json"):
        with pytest.raises(BabeltowerError, match="holds no"):
            compare_runs(old, path)
    other = [dataclasses.replace(r, cell={**r.cell, "model": "n"}) for r in run_of(1)]
    with pytest.raises(BabeltowerError, match="share no measured cell"):
        compare_runs(old, written(tmp_path / "other.json", other))


def report_of(turned: dict[str, list[dict[str, Any]]], *, passed: bool = True) -> dict[str, Any]:
    """What bench/retrieval.py writes, as far as a comparison reads it: 500 queries, 300 found at k = 1."""

    def side(code: str) -> dict[str, Any]:
        hits = turned.get(code, [])
        at = 0.6 + sum(1 if not t["reference_hits"] else -1 for t in hits) / 500
        return {
            "reference": {"at": {"1": 0.6}, "n_queries": 500},
            "exported": {"at": {"1": at}, "n_queries": 500},
            "turned": hits,
        }

    codes = ("por_Latn", "eng_Latn")
    return {
        "schema": "babeltower-retrieval/1",
        "dataset": "emoji",
        "protocol": "any",
        "n_images": 500,
        "n_texts": 1_000,
        "model": {"name": "m", "fingerprint": "bt1-0", "precision": "int8", "engine": "openvino"},
        "verdict": {"passed": passed, "failures": [] if passed else ["por_Latn: R@1 fell"]},
        "languages": [{"code": c, "text_to_image": side(c), "image_to_text": side("none")} for c in codes],
    }


def lost(*queries: int) -> list[dict[str, Any]]:
    return [{"query": q, "k": 1, "reference_hits": True, "margin": 0.1} for q in queries]


def test_recall_that_fell_in_one_language_is_found() -> None:
    old, new = report_of({"por_Latn": lost(1, 2, 3)}), report_of({"por_Latn": lost(*range(2, 40))})
    changes = judged(changes_of_retrieval(old, new), tolerance=0.03)
    assert changes[0].outcome is Outcome.WORSE
    assert "por_Latn, text_to_image, R@1" in changes[0].name
    assert changes[0].note == "36 lost, 1 gained of 500"
    assert changes[0].worse_by == pytest.approx(7.0)
    assert all(change.outcome is Outcome.SAME for change in changes[1:])
    back = judged(changes_of_retrieval(new, old), tolerance=0.03)
    assert back[0].outcome is Outcome.BETTER


def test_a_few_turned_hits_are_noise_and_a_failed_verdict_is_not(tmp_path: Path) -> None:
    old, new = report_of({"por_Latn": lost(1, 2, 3)}), report_of({"por_Latn": lost(3, 4, 5, 6, 7)})
    assert {c.outcome for c in judged(changes_of_retrieval(old, new), tolerance=0)} == {Outcome.SAME}
    failed = report_of({}, passed=False)
    for name, report in (("old", old), ("new", failed)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    result = compared(tmp_path / "old.json", tmp_path / "new.json")
    assert result.exit_code == 1
    assert "por_Latn: R@1 fell" in result.stdout


def test_reports_of_other_models_are_not_compared() -> None:
    other = copy.deepcopy(report_of({}))
    other["model"]["fingerprint"] = "bt1-1"
    with pytest.raises(BabeltowerError, match="the model's fingerprint is bt1-0 in one and bt1-1"):
        changes_of_retrieval(report_of({}), other)


def edited(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A report with limits and cosines, one figure of which was changed; ``None`` removes it."""
    report = copy.deepcopy(report_of({"por_Latn": lost(1, 2)}))
    report |= {"images": {"cosine_min": 1.0}, "limits": {"min_cosine": 0.9}, "language_map": "right"}
    for language in report["languages"]:
        language["texts"] = {"cosine_min": 0.95}
    inner: Any = report
    for key in path[:-1]:
        inner = inner[key]
    if path and value is None:
        del inner[path[-1]]
    elif path:
        inner[path[-1]] = value
    return report


LANGUAGE = ("languages", 0)
RECALL = (*LANGUAGE, "text_to_image")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*RECALL, "exported", "at", "1"), 0.0, "0 hits of 500, where 298 add up"),
        ((*RECALL, "exported", "at", "1"), 2.0, "expected shares between 0 and 1"),
        ((*RECALL, "exported", "at", "1"), True, "hits of 500|expected shares"),
        ((*RECALL, "reference", "at", "1"), 0.9, "298 hits of 500, where 448 add up"),
        ((*RECALL, "turned"), [], "298 hits of 500, where 300 add up"),
        ((*RECALL, "reference", "n_queries"), 0, "measured on 0 queries"),
        ((*LANGUAGE, "texts", "cosine_min"), -1, "por_Latn passed with a cosine of -1, under 0.9"),
        (("images", "cosine_min"), -1, "images passed with a cosine of -1"),
        (("languages",), [], "it has no language"),
        ((*RECALL, "exported", "at", "1"), None, "KeyError"),
        ((*RECALL, "reference", "at"), {}, "KeyError"),
        ((*RECALL, "exported", "at"), "x", "holds no benchmark records"),
        (("images",), None, "KeyError"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(
    path: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "good.json").write_text(json.dumps(edited((), None)))
    (tmp_path / "bad.json").write_text(json.dumps(edited(path, value)))
    assert {c.outcome for c in compare_runs(tmp_path / "good.json", tmp_path / "good.json")} == {Outcome.SAME}
    for old, new in (("good", "bad"), ("bad", "good")):
        with pytest.raises(BabeltowerError, match=message):
            compare_runs(tmp_path / f"{old}.json", tmp_path / f"{new}.json")


def test_reports_of_other_language_maps_are_not_compared() -> None:
    with pytest.raises(BabeltowerError, match="language_map is right in one and paper in the other"):
        changes_of_retrieval(edited((), None), edited(("language_map",), "paper"))


@pytest.mark.parametrize("sample", [0.0, -1.0])
def test_samples_that_are_not_positive_are_not_compared(sample: float) -> None:
    (record, *_) = run_of(1)
    broken = dataclasses.replace(record, samples=(sample,) * len(record.samples))
    for pair in ((record, broken), (broken, record)):
        with pytest.raises(BabeltowerError, match="positive samples"):
            changes_of_records(*([each] for each in pair))


def test_a_sample_is_a_number() -> None:
    (record, *_) = run_of(1)
    with pytest.raises(BabeltowerError, match="samples that are not numbers"):
        dataclasses.replace(record, samples=(True, *record.samples[1:]))


def test_chances() -> None:
    assert chance_of_binomial(0, 0) == 1
    assert chance_of_binomial(10, 0) == pytest.approx(2 / 2**10)
    assert chance_of_binomial(900, 1_000) == pytest.approx(0.0231, abs=2e-3)
    assert chance_of_ratio([[1.0, 1.0]], [[1.0, 1.0]]) == 1
    assert chance_of_ratio([[1.0, 1.0]], [[2.0, 2.0]]) < 1e-9
    assert chance_of_ratio([[1.0]], [[2.0]]) == 1
    assert discoveries([0.001, 0.9, 0.04]) == [True, False, False]
    assert discoveries([0.01, 0.02, 0.03]) == [True, True, True]
    assert discoveries([]) == []


def test_tails_of_student() -> None:
    from bench.records.statistics import _student_tails

    for freedom, t in ((1, 12.706), (4, 2.776), (10, 2.228), (13, 2.160)):
        assert _student_tails(t, freedom) == pytest.approx(0.05, rel=1e-3)
    assert _student_tails(0.0, 5) == pytest.approx(1)
