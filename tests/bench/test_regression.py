"""What was made slower or wrong on purpose is found: by comparing two runs, or by the gate."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from sample_models import CHECKPOINTS, Exported
from typer.testing import CliRunner

from bench.compare import app as compare_app
from bench.compare import compare_runs
from bench.latency import Group, LatencyPlan, groups_of_model, measure_latency
from bench.records.changes import Outcome
from bench.records.record import read_records, write_records
from bench.timing.timed_process import Pace
from export.checkpoint import towers_from_checkpoint
from export.graphs.edits import add_weight, float_like
from export.repository import ExportOptions, repository_from_towers
from runtime.errors import ParityError
from runtime.manifest import Engine, Modality

PLAN = LatencyPlan(batches=(1, 8), tokens=(16,), processes=4, pace=Pace(seconds=0.0, min_runs=12))
N_MORE = 1_000
SLEEPING = (
    "-c",
    """
import sys, time
from runtime.backends.onnxruntime import OnnxRuntimeBackend
run = OnnxRuntimeBackend.run
def slow(self, inputs, outputs):
    started = time.perf_counter()
    found = run(self, inputs, outputs)
    time.sleep(max(0.001, time.perf_counter() - started))  # as long as the run: a busy machine hides less
    return found
OnnxRuntimeBackend.run = slow
from bench.timing.timed_process import main
main(sys.argv[1:])
""",
)


def text_tower(model: Path) -> Group:
    groups = groups_of_model(model, engines=[Engine.ONNXRUNTIME])
    return next(group for group in groups if group.modality is Modality.TEXT)


def with_more_products(model: Path, folder: Path) -> Path:
    """A copy whose text tower multiplies its vectors with the identity, again and again."""
    shutil.copytree(model.parent, folder)
    copy = folder / model.name
    path = text_tower(copy).graph
    model_ = onnx_ir.load(path)
    graph = model_.graph
    vector = graph.outputs[0]
    width = int(str(vector.shape[-1]))  # type: ignore[index]
    identity = add_weight(graph, "identity", np.eye(width, dtype=np.float32))
    name, vector.name, value = vector.name, "vector_once", vector
    for i in range(N_MORE):
        product = onnx_ir.node("MatMul", [value, identity], name=f"again/{i}")
        value = float_like(product, f"again_{i}", vector.shape)
        graph.append(product)
    value.name = name
    graph.outputs[0] = value
    onnx_ir.save(model_, path)
    return copy


def run_into(folder: Path, model: Path, plan: LatencyPlan = PLAN) -> Path:
    """A run of the text tower, as a file of records."""
    write_records(measure_latency([text_tower(model)], plan), folder / "latency.json")
    return folder / "latency.json"


def wall_outcomes(old: Path, new: Path) -> set[Outcome]:
    """Of the wall times, at a tolerance that a busy machine keeps within."""
    changes = compare_runs(old, new, tolerance=0.3)
    found = [change.outcome for change in changes if "wall" in change.name]
    assert len(found) == len(PLAN.batches)
    return set(found)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def before(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_into(tmp_path_factory.mktemp("before"), model)


def test_nothing_is_found_where_nothing_changed(model: Path, before: Path, tmp_path: Path) -> None:
    assert Outcome.WORSE not in wall_outcomes(before, run_into(tmp_path, model))


def test_a_sleep_is_found(model: Path, before: Path, tmp_path: Path) -> None:
    after = run_into(tmp_path, model, dataclasses.replace(PLAN, worker=SLEEPING))
    assert wall_outcomes(before, after) == {Outcome.WORSE}
    assert CliRunner().invoke(compare_app, [str(before), str(after)]).exit_code == 1


def test_a_slower_graph_is_found(model: Path, before: Path, tmp_path: Path) -> None:
    after = run_into(tmp_path, with_more_products(model, tmp_path / "repository"))
    assert wall_outcomes(before, after) == {Outcome.WORSE}
    by_batch = [
        {r.cell["batch"]: r for r in read_records(path) if r.cell["metric"] == "wall"}
        for path in (before, after)
    ]
    for batch, old in by_batch[0].items():
        new = by_batch[1][batch]
        assert new.artefact != old.artefact
        more = new.settings["operations_per_run"] - old.settings["operations_per_run"]
        assert more == N_MORE * 2 * int(batch) * 128 * 128


def test_a_wrong_language_token_is_refused_by_the_gate(tmp_path: Path) -> None:
    towers = towers_from_checkpoint(CHECKPOINTS / "nllb-clip")
    ids = towers.text_preprocessing.language_ids
    shifted = dict(zip(ids, [*list(ids.values())[1:], next(iter(ids.values()))], strict=True))
    wrong = dataclasses.replace(towers.text_preprocessing, language_ids=shifted)
    broken = dataclasses.replace(towers, text_preprocessing=wrong)
    with pytest.raises(ParityError, match="does not agree with PyTorch"):
        repository_from_towers(
            broken, tmp_path, name="wrong", options=ExportOptions(captions_per_language=0, threads=1)
        )
    assert not (tmp_path / "wrong.babeltower.json").exists()
