"""Vectors without a direction: every comparison in the tree refuses a row that is NaN, infinite or zero."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from sample_models import ROOT

from bench.compare import compare_runs
from bench.corpora.full_size import _text_record, _Way
from bench.corpora.loops import TimedLoop
from bench.gpu.tensorrt import _seconds
from bench.latency import _compare, _Found
from bench.peers.measure import require_equal
from bench.peers.process import PeerError
from bench.precision_speed import TORCH, _cosines, _require_close
from bench.records.record import read_records, record_of, write_records
from bench.records.retrieval import retrieval_records
from export.parity.limits import limits_of
from export.parity.measure import Agreement, _worst
from export.parity.measure import agreement as parity_agreement
from export.retrieval.metrics import agreement as retrieval_agreement
from export.retrieval.verdict import _cosine_failures
from export.tuning.trial_server import TrialModel
from runtime.cosines import (
    highest,
    lowest,
    lowest_cosine,
    mean_cosine,
    nan_first,
    require_directions,
    row_cosines,
    rows_without_direction,
    unit_rows,
    worst_rows,
)
from runtime.embeddings import Encoding, cosine_similarity
from runtime.errors import BabeltowerError, ExportError, InputError
from runtime.indexes.exact import Index
from runtime.indexes.space import Space
from runtime.manifest import Engine, Precision
from runtime.rollout.gate import ProbeLimits, verdict_of_vectors
from runtime.zeroshot import class_vectors_from_prompts

N, DIM, BAD = 6, 8, 4
KINDS = {"nan": np.nan, "inf": np.inf, "minus inf": -np.inf, "zero": 0.0}


def unit(seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).standard_normal((N, DIM))
    return (rows / np.sqrt((rows**2).sum(1, keepdims=True))).astype(np.float32)


def spoilt(kind: str, *, whole: bool = True) -> Any:
    rows = unit()
    rows[BAD, slice(None) if whole or kind == "zero" else 3] = KINDS[kind]
    return rows


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["found", "reference", "both"])
def pair(request: pytest.FixtureRequest, kind: str) -> tuple[Any, Any]:
    """Found and reference, equal but for one row of either, or of both."""
    bad, good = spoilt(kind), unit()
    return {"found": (bad, good), "reference": (good, bad), "both": (bad, bad)}[request.param]


# --- the function ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 7.0, 1e30, 1e300])
def test_row_cosines_are_those_of_any_length(scale: float) -> None:
    a, b = np.float64(unit(1)) * scale, np.float64(unit(2))
    np.testing.assert_allclose(row_cosines(a, b), (np.float64(unit(1)) * b).sum(1), atol=1e-7)
    np.testing.assert_allclose(row_cosines(a, a), 1, atol=1e-15)
    np.testing.assert_allclose(row_cosines(a, -a), -1, atol=1e-15)
    assert row_cosines(a, b).dtype == np.float64
    assert np.abs(row_cosines(a, a)).max() <= 1


def test_row_cosines_of_integers_and_halves() -> None:
    rows = np.clip(np.rint(unit() * 127), -127, 127).astype(np.int8)
    assert row_cosines(rows, unit()).min() > 0.999
    assert row_cosines(unit().astype(np.float16), unit()).min() > 0.999999


@pytest.mark.filterwarnings("error")
def test_a_row_without_direction_has_no_cosine(pair: tuple[Any, Any]) -> None:
    cosines = row_cosines(*pair)
    assert np.flatnonzero(np.isnan(cosines)).tolist() == [BAD]
    assert not cosines.min() >= -1
    assert worst_rows(cosines) == f"row {BAD}"
    with pytest.raises(
        InputError, match=rf"1 of {N} (compared|reference) vectors are zero or not.*: row {BAD}\."
    ):
        lowest_cosine(*pair)
    with pytest.raises(InputError, match=": e"):
        lowest_cosine(*pair, names="abcdef")
    with pytest.raises(InputError, match=f"row {BAD}"):
        mean_cosine(*pair)


@pytest.mark.parametrize("kind", ["nan", "inf", "minus inf"])
def test_one_component_that_is_not_finite_is_enough(kind: str) -> None:
    rows = spoilt(kind, whole=False)
    assert rows_without_direction(rows).tolist() == [BAD]
    assert np.isnan(row_cosines(rows, unit())[BAD])
    with pytest.raises(InputError, match=f"1 of {N} vectors are not finite: row {BAD}"):
        unit_rows(rows)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 2)), ((2, 3), (1, 3)), ((3,), (3,)), ((0, 3), (0, 3)), ((2, 0), (2, 0))]
)
def test_shapes_that_do_not_fit_are_an_error(shapes: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="expected the same"):
        row_cosines(np.ones(shapes[0]), np.ones(shapes[1]))


def test_many_rows_are_named_in_part() -> None:
    with pytest.raises(
        InputError, match=r"12 of 12 rows of a test .*: row 0, row 1, row 2, row 3, row 4 and 7 more"
    ):
        require_directions(np.zeros((12, 3)), what="rows of a test")
    require_directions(unit(), what="rows of a test")


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.nan, 1.0], [0.5, math.nan, 0.9]])
def test_extremes_do_not_pass_over_nan(values: list[float]) -> None:
    assert math.isnan(lowest(values))
    assert math.isnan(highest(values))
    assert math.isnan(min(values, key=nan_first))
    assert (lowest([0.5, 0.2]), highest([0.5, 0.2])) == (0.2, 0.5)


# --- every comparison -----------------------------------------------------------------------------------


def by_parity(found: Any, reference: Any) -> list[str]:
    limits = limits_of(Precision.FP32, Engine.ONNXRUNTIME)
    measured = parity_agreement(found, reference, [f"text {i}" for i in range(N)])
    good = parity_agreement(reference[:2], reference[:2], ["x", "y"])
    worst = [_worst([measured, good]), _worst([good, measured])]
    assert not math.isnan(measured.min_cosine) or {w.worst for w in worst} == {measured.worst}
    return [w.worst for w in (measured, *worst) if not w.min_cosine >= limits.min_cosine]


def by_retrieval(found: Any, reference: Any) -> list[str]:
    limits = SimpleNamespace(min_cosine=0.9, min_mean_cosine=0.9)
    return list(_cosine_failures("texts", retrieval_agreement(reference, found), limits))  # type: ignore[arg-type]


def by_gate(found: Any, reference: Any) -> list[str]:
    languages = ("eng_Latn", "por_Latn", "por_Latn", "por_Latn", "zho_Hans", "zho_Hans")
    probes = SimpleNamespace(languages=languages, text_vectors=reference, image_vectors=reference)
    limits = ProbeLimits(min_cosine=0.5, min_mean=0.5, measured={}, measured_images=0.5)
    return list(verdict_of_vectors(found, found, probes, limits).faults)  # type: ignore[arg-type]


def by_peers(found: Any, reference: Any) -> list[str]:
    try:
        require_equal(found, reference, SimpleNamespace(precision=Precision.INT8))  # type: ignore[arg-type]
    except PeerError as error:
        return [str(error)]
    return []


class Gives:
    """A process, or a backend, with an answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def vectors(self, inputs: Any) -> Any:
        return self.answer

    def run(self, inputs: Any, outputs: Any) -> list[Any]:
        return [self.answer]


def by_latency(found: Any, reference: Any) -> list[str]:
    opened = {_Group(Precision.FP32): Gives(reference), _Group(Precision.INT8): Gives(found)}
    shapes = {group: {"1×8": Path("inputs")} for group in opened}
    kept = {group: _Found() for group in opened}
    _compare(opened, shapes, SimpleNamespace(), kept)  # type: ignore[arg-type]
    return [f.error for f in kept.values() if f.error]


@dataclasses.dataclass(frozen=True)
class _Group:
    precision: Precision
    engine: Engine = Engine.ONNXRUNTIME
    model: str = "m"
    modality: str = "text"


def by_precision_speed(found: Any, reference: Any) -> list[str]:
    artefact = SimpleNamespace(precision=Precision.INT8, graph=Path("a/b"))
    try:
        cosines = _cosines({TORCH: Gives(reference), "ours": Gives(found)}, {})
        _require_close(cosines, {"ours": artefact})  # type: ignore[dict-item]
    except BabeltowerError as error:
        return [str(error)]
    return []


def by_corpus(found: Any, reference: Any) -> list[str]:
    def way(vectors: Any) -> _Way:
        return _Way(turns=[TimedLoop(10, 1.0, 1.0, 0.1, vectors)])

    ways = {"pipeline": way(found), "plain": way(reference), "open_clip": way(reference)}
    error = _text_record("xlm-roberta-base-ViT-B-32", "short", "pipeline", ways).error
    return [] if error is None else [error]


def by_served_trials(found: Any, reference: Any) -> list[str]:
    model: Any = TrialModel.__new__(TrialModel)
    model.requests, model.clients, model.told, model._seen = [], 1, None, {}
    server: Any = SimpleNamespace(addresses=SimpleNamespace(grpc=""))
    try:
        for vectors in (reference, found):
            load = SimpleNamespace(failures={}, vectors=dict(enumerate(vectors)))
            with mock.patch("export.tuning.trial_server.load_of_server", return_value=load):
                model.load(server, None)
    except ExportError as error:
        return [str(error)]
    return []


COMPARISONS = [
    by_parity,
    by_retrieval,
    by_gate,
    by_peers,
    by_latency,
    by_precision_speed,
    by_corpus,
    by_served_trials,
]


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons_accept_equal_vectors(comparison: Any) -> None:
    assert comparison(unit(), unit()) == []


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_comparisons_refuse_a_row_without_direction(comparison: Any, pair: tuple[Any, Any]) -> None:
    faults = comparison(*pair)
    assert faults
    named = {by_gate: "zho_Hans", by_parity: f"text {BAD}", by_served_trials: "Request 4"}
    if comparison in named:
        assert all(name in fault for name, fault in [(named[comparison], faults[0])])
    else:
        assert f"row {BAD}" in faults[0]


# --- scores ---------------------------------------------------------------------------------------------


def test_similarities_of_zeros_are_zero_and_others_are_refused(kind: str) -> None:
    for queries, rows in ((spoilt(kind), unit()), (unit(), spoilt(kind))):
        if kind == "zero":
            scores = cosine_similarity(queries, rows)
            assert np.isfinite(scores).all()
            assert ((scores == 0).all(axis=1) | (scores == 0).all(axis=0)).any()
        else:
            with pytest.raises(InputError, match=f"not finite: row {BAD}"):
                cosine_similarity(queries, rows)


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8", "binary"])
def test_queries_without_direction_are_refused_by_indexes(kind: str, encoding: str) -> None:
    space = Space("f" * 16, DIM, Encoding(encoding))
    with pytest.raises(InputError, match=rf"1 of {N} queries are zero or not finite.*row {BAD}"):
        space.decoded_queries(spoilt(kind))


def test_a_flat_index_refuses_what_has_no_score(kind: str) -> None:
    ids = tuple("abcdef")
    index = Index(ids, unit(), "f")
    with pytest.raises(InputError, match=rf"queries are zero or not finite.*row {BAD}"):
        index.search(spoilt(kind), fingerprint="f")
    spoiled = Index(ids, spoilt(kind), "f")
    if kind == "zero":
        assert {h.score for hits in spoiled.search(unit(), fingerprint="f") for h in hits if h.id == "e"} == {
            0.0
        }
    else:
        with pytest.raises(InputError, match=f"not finite: row {BAD}"):
            spoiled.search(unit(), fingerprint="f")


def test_prompts_that_cancel_out_are_no_class(kind: str) -> None:
    prompts = np.repeat(unit(), 2, axis=0)
    assert class_vectors_from_prompts(prompts, n_labels=N).shape == (N, DIM)
    prompts[2 * BAD] = KINDS[kind] if kind != "zero" else -prompts[2 * BAD + 1]
    with pytest.raises(InputError, match=rf"labels' mean prompt vectors are zero or not finite.*row {BAD}"):
        class_vectors_from_prompts(prompts, n_labels=N)


# --- records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_record_of_no_figure_is_refused(tmp_path: Path, value: float) -> None:
    cell = {"suite": "latency", "metric": "wall"}
    for samples, settings in (
        ([1.0, value], {}),
        ([1.0], {"min_cosine": value}),
        ([1.0], {"a": {"b": [value]}}),
    ):
        with pytest.raises(BabeltowerError, match=r"(samples|min_cosine|settings.a.b) that are not finite"):
            record_of(cell, samples, unit="ms", settings=settings)
    write_records(
        [record_of(cell, [1.0, 2.0], unit="ms", settings={"min_cosine": 0.5})], tmp_path / "old.json"
    )
    text = (tmp_path / "old.json").read_text()
    for part in ("2.0", "0.5"):
        (tmp_path / "new.json").write_text(text.replace(part, json.dumps(value)))
        with pytest.raises(BabeltowerError, match=r"holds no benchmark records.*(NaN|Infinity)"):
            read_records(tmp_path / "new.json")
        for pair in (("old.json", "new.json"), ("new.json", "old.json")):
            with pytest.raises(BabeltowerError, match=r"NaN|Infinity"):
                compare_runs(tmp_path / pair[0], tmp_path / pair[1])


def test_records_beside_a_report_are_not_passed_over(tmp_path: Path) -> None:
    recall = {"at": {"1": 0.5}, "n_queries": 4}
    side = {"reference": recall, "exported": recall, "turned": []}
    report = {
        "schema": "babeltower-retrieval/1",
        "protocol": "any",
        "model": {"name": "m", "precision": "fp32", "engine": "e"},
        "dataset": "d",
        "verdict": {"passed": True},
        "languages": [{"code": "por", "text_to_image": side, "image_to_text": side}],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert len(retrieval_records(tmp_path)) == 1
    (tmp_path / "cells.json").write_text('{"schema": 2, "cells": [{"samples": [NaN]}]}')
    with pytest.raises(BabeltowerError, match="NaN"):
        compare_runs(tmp_path, tmp_path)


def test_a_backend_that_is_timed_must_give_vectors(kind: str) -> None:
    tower, grid = SimpleNamespace(outputs={"8": "vector"}), SimpleNamespace(warm_up=0, repeats=2)
    assert len(_seconds(Gives(unit()), {}, tower, grid)) == 2  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"timed vectors are zero or not finite.*row {BAD}"):
        _seconds(Gives(spoilt(kind)), {}, tower, grid)  # type: ignore[arg-type]


# --- one home -------------------------------------------------------------------------------------------

_HOMES = {
    "linalg.norm": {"runtime/cosines.py"},
    "linalg.vector_norm": {"export/towers.py"},  # a tower's own last step, in torch
}


def test_lengths_are_computed_in_one_place() -> None:
    found: dict[str, set[str]] = {name: set() for name in _HOMES}
    for folder in ("runtime", "export", "triton_models", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    for name in _HOMES:
                        if ast.unparse(node).endswith(name):
                            found[name].add(path.relative_to(ROOT).as_posix())
    assert found == _HOMES


def test_no_comparison_lets_nan_through() -> None:
    """``if cosine < limit`` is false for NaN; ``if not cosine >= limit`` is true."""
    wrong = []
    for folder in ("runtime", "export", "triton_models", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Lt, ast.Gt)):
                    words = ast.unparse(node)
                    if "cosine" in words:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {words}")
    assert wrong == []


def test_agreements_keep_nan_whatever_the_order() -> None:
    good = Agreement(n=1, max_abs_error=0.1, min_cosine=0.9, mean_cosine=0.95, worst="good")
    bad = Agreement(n=1, max_abs_error=math.nan, min_cosine=math.nan, mean_cosine=math.nan, worst="bad")
    for parts in ([good, bad], [bad, good]):
        found = _worst(parts)
        assert found.worst == "bad"
        assert all(map(math.isnan, (found.max_abs_error, found.min_cosine, found.mean_cosine)))
