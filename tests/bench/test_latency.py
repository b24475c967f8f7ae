"""Latency of one sample end to end, in few runs: each cell is there, compared, counted, held to a limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_models import CHECKPOINTS, Exported
from small_exports import FEW
from tensorrt_double import install

from bench.latency import LatencyPlan, groups_of_model, measure_latency
from bench.records.record import Record, read_records, record_of, suite_cell, write_records
from bench.timing.measured_inputs import Shape, inputs_of_shape, shapes_of
from bench.timing.roofline import limit_ms, peaks_from_records, share_of_limit
from bench.timing.timed_process import GraphSpec, Pace, TimedProcess, timed_runs
from export.repository import repository_from_checkpoint
from export.variants import forms_for
from runtime.backends import open_backend
from runtime.errors import BabeltowerError
from runtime.manifest import Engine, Manifest, Modality, Precision

PLAN = LatencyPlan(batches=(1, 2), tokens=(8, 9_999), processes=2, turns=2, pace=Pace(0.0, min_runs=3))


def peak(name: str, value: float, threads: int = 1) -> Record:
    engine = "memory" if name.startswith("read") else "openvino"
    cell = suite_cell(suite="peaks", metric="rate", engine=engine, precision=name)
    return record_of(cell, [value], unit="GOP/s", settings={"threads": threads})


def test_a_sample_is_timed_in_every_cell(exported: Exported, tmp_path: Path) -> None:
    groups = groups_of_model(exported("nllb-clip"), precisions=[Precision.FP32, Precision.BF16])
    records = measure_latency(groups, PLAN)
    write_records(records, tmp_path / "latency.json")
    assert read_records(tmp_path / "latency.json") == records
    measured = [r for r in records if r.error is None]
    # (4 text shapes + 2 image shapes) × wall, cpu, and for both towers load, first, resident; on 2 engines
    assert len(measured) == 2 * (6 * 2 + 2 * 3)
    assert len({tuple(r.cell.values()) for r in records}) == len(records)
    for record in measured:
        assert record.artefact is not None
        assert min(record.samples) > 0
        assert len(record.by_process) == 2
        if record.cell["metric"] in ("wall", "cpu"):
            assert record.processes == (6, 6)
            assert record.settings["min_cosine"] > 0.99999
            assert record.settings["operations_per_run"] > 0
    missing = [r for r in records if r.error is not None]
    assert {r.cell["precision"] for r in missing} == {"bf16"}
    assert all("holds ['fp32']" in r.error for r in missing if r.error)


def test_what_could_not_be_exported_is_a_row_for_each_engine(exported: Exported) -> None:
    errors = {Precision.INT8: "it retrieves worse than PyTorch"}
    groups = groups_of_model(
        exported("nllb-clip"), precisions=[Precision.FP32, Precision.INT8], errors=errors
    )
    failed = {(g.engine, g.modality.value) for g in groups if g.precision is Precision.INT8}
    assert failed == {(e, m) for e in ("onnxruntime", "openvino") for m in ("text", "image")}
    assert {g.error for g in groups} == {"", "it retrieves worse than PyTorch"}


def test_operations_grow_with_the_rows(exported: Exported) -> None:
    (group, *_) = groups_of_model(exported("nllb-clip"), engines=[Engine.ONNXRUNTIME])
    plan = LatencyPlan(batches=(1, 8), tokens=(16,), processes=1, pace=Pace(0.0, min_runs=1))
    cpu = [r for r in measure_latency([group], plan) if r.cell["metric"] == "cpu"]
    one, eight = (r.settings for r in cpu)
    assert eight["operations_per_run"] == 8 * one["operations_per_run"]
    assert one["bytes_per_run"] < eight["bytes_per_run"] < 8 * one["bytes_per_run"]


def test_a_graph_that_computes_something_else_is_not_timed(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group, *_) = groups_of_model(exported("nllb-clip"), engines=[Engine.ONNXRUNTIME])
    monkeypatch.setattr(
        TimedProcess, "vectors", lambda self, inputs: np.random.default_rng().standard_normal((1, 4))
    )
    plan = LatencyPlan(batches=(1,), tokens=(8,), processes=1, pace=Pace(0.0, min_runs=1))
    records = measure_latency([group], plan)
    assert records
    assert all("vectors differ from FP32's" in (r.error or "") for r in records)


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    spec = GraphSpec(str(tmp_path / "no.onnx"), "onnxruntime", "fp32", 1, "vector")
    np.savez(tmp_path / "inputs.npz", pixels=np.zeros(1))
    with pytest.raises(BabeltowerError, match="is missing"):
        TimedProcess(spec, tmp_path / "inputs.npz")
    with pytest.raises(BabeltowerError, match="exit code 3"):
        TimedProcess(spec, tmp_path / "inputs.npz", worker=("-c", "raise SystemExit(3)"))


@pytest.mark.parametrize("name", ["nllb-clip", "capivara", "altclip"])
def test_inputs_have_the_shape_that_was_asked_for(name: str, exported: Exported) -> None:
    model = exported(name)
    manifest = Manifest.read(model)
    tokenizer = model.parent / manifest.variants["fp32"].tokenizer
    shapes = shapes_of(manifest, Modality.TEXT, batches=[1, 3], tokens=[2, 16, 100_000])
    assert [s.tokens for s in shapes[:3]] == [2, 16, manifest.text.context_length]
    for shape in shapes:
        inputs = inputs_of_shape(manifest, tokenizer, Modality.TEXT, shape)
        assert inputs["input_ids"].shape == (shape.batch, shape.tokens)
        assert inputs["input_ids"][0, -1] == manifest.text.suffix_ids[-1]
        assert (inputs["input_ids"] != manifest.text.pad_id).all()
    pixels = inputs_of_shape(manifest, tokenizer, Modality.IMAGE, Shape(3))["pixels"]
    assert pixels.shape == (3, 3, manifest.image.height, manifest.image.width)


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    peaks = peaks_from_records([peak("fp32", 100), peak("int8", 400), peak("read 1 MB", 50)])
    computing = {"operations_by_precision": {"fp32": 10**8, "int8": 4 * 10**8}, "bytes_per_run": 1000}
    assert limit_ms(computing, peaks) == pytest.approx(2.0)
    moving = {"operations_by_precision": {"fp32": 10**8}, "bytes_per_run": 10**9}
    assert limit_ms(moving, peaks) == pytest.approx(20.0)
    assert limit_ms({**moving, "operations_by_precision": {"fp16": 1}}, peaks) is None


def test_small_weights_are_held_to_the_cache_s_bandwidth() -> None:
    records = [peak("fp32", 1e9), peak("read 16 MB", 10), peak("read 1 MB", 100)]
    peaks = peaks_from_records(records)
    assert peaks.read_rate(1 << 20) == 100
    assert peaks.read_rate((1 << 20) + 1) == 10
    assert peaks.read_rate(1 << 40) == 10


def test_a_share_wants_equal_threads() -> None:
    settings = {"threads": 1, "operations_by_precision": {"fp32": 10**8}, "bytes_per_run": 1}
    cell = suite_cell(suite="latency", metric="wall")
    measured = record_of(cell, [2.0, 4.0, 3.0], unit="ms", settings=settings)
    one, two = ([peak("fp32", 100, n), peak("read 1 MB", 1, n)] for n in (1, 2))
    assert share_of_limit(measured, peaks_from_records(one)) == pytest.approx(1 / 3)
    assert share_of_limit(measured, peaks_from_records(two)) is None
    with pytest.raises(BabeltowerError, match="of one number of threads"):
        peaks_from_records([*one, *two])


def test_rows_a_second_are_held_by_what_a_core_did() -> None:
    settings = {"threads": 2, "operations_by_precision": {"fp32": 10**8}, "bytes_per_run": 1}
    cell = suite_cell(suite="throughput", metric="rate", engine="openvino", batch=8)
    own = {**settings, "rows_per_core_s": [2_000.0, 4_000.0, 9_000.0]}
    measured = record_of(cell, [8_000.0], unit="rows/s", settings=own)
    peaks = peaks_from_records([peak("fp32", 100), peak("read 1 MB", 1)])
    assert share_of_limit(measured, peaks) == pytest.approx(1 / 2)  # 2 ms of a core for 8 rows, 1 at the peak


def test_a_gpu_is_held_to_its_own_peaks() -> None:
    cells = [
        suite_cell(suite="peaks", metric="rate", engine="cuda", precision=name)
        for name in ("fp32", "read 1024 MB")
    ]
    gpu = [record_of(cell, [1_000.0], unit="GOP/s", settings={}) for cell in cells]
    records = [*gpu, peak("fp32", 100), peak("read 1 MB", 1)]
    settings = {"threads": 1, "operations_by_precision": {"fp32": 10**8}, "bytes_per_run": 1}
    cell = suite_cell(suite="latency", metric="device", engine="tensorrt")
    measured = record_of(cell, [0.2], unit="ms", settings=settings)
    assert share_of_limit(measured, peaks_from_records(records, gpu=True)) == pytest.approx(0.5)
    assert share_of_limit(measured, peaks_from_records(records)) is None


def test_on_a_gpu_the_device_s_events_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = install(monkeypatch).gpu
    forms = forms_for([Precision.FP32], [Engine.TENSORRT], installed=[Engine.TENSORRT])
    options = replace(FEW, forms=forms)
    export = repository_from_checkpoint(CHECKPOINTS / "nllb-clip", tmp_path, name="it", options=options)
    manifest, variant = export.manifest, export.manifest.variants["fp32_tensorrt"]
    tower = variant.tower(Modality.TEXT)
    plan = tmp_path / tower.model / "1" / tower.graph
    inputs = inputs_of_shape(manifest, tmp_path / variant.tokenizer, Modality.TEXT, Shape(2, 8))
    backend = open_backend(Engine.TENSORRT, plan, precision=Precision.FP32)
    try:
        times = timed_runs(backend, inputs, tower.outputs[str(manifest.dim)], Pace(0.0, min_runs=4))
    finally:
        backend.close()
    assert len(times.device_ms) == len(times.wall_ms) == 4
    assert all(0 < device <= wall for device, wall in zip(times.device_ms, times.wall_ms, strict=True))
    assert gpu.calls.count("cudaEventCreate") == gpu.calls.count("cudaEventDestroy") == 8
