"""Steps of the run on a GPU, on the processor with tiny towers: the same code writes the same lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sample_models import ROOT, Exported

from bench.gpu import gate, run
from bench.gpu.gate import embed_model, judge_model, models_of
from bench.gpu.lines import Bench, read_lines
from bench.gpu.samples import _add_cuda
from bench.gpu.simulated import SIMULATED, simulated_form, simulated_model
from bench.gpu.skeletons import skeleton_from_graph
from bench.gpu.speed import write_graphs
from bench.gpu.towers import DRY_TOWERS, TimedTower
from bench.gpu.turns import Turn
from export.retrieval.sets import RetrievalSet
from runtime.manifest import Manifest


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("bench.gpu.lines._MEMORY", tmp_path / "none")
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Bench(tmp_path, tmp_path / "out", tmp_path / "work", dry=True, ends_at=time.time() + 600)


def lines(bench: Bench) -> list[dict[str, object]]:
    return list(read_lines(bench.out / "gpu.jsonl"))


@pytest.mark.parametrize("tower", DRY_TOWERS, ids=lambda tower: tower.slug)
def test_a_tower_is_timed_beside_pytorch(tower: TimedTower, bench: Bench, exported: Exported) -> None:
    from bench.gpu.tower_times import prepare_and_time

    model = exported(tower.variant)
    files = Manifest.read(model).variants["fp32"].tower(tower.modality)
    graph = model.parent / files.model / str(files.version) / files.graph
    skeleton_from_graph(graph, bench.skeleton(tower.slug))
    write_graphs(bench, tower.slug)
    Turn.of(bench, tower.slug).begin(time.time() + 600)
    prepare_and_time(bench, tower.slug, until=0)
    speeds = [line for line in lines(bench) if line["step"] == "speed"]
    assert not [line for line in speeds if "error" in line]
    assert [(line["by"], line["shape"]) for line in speeds] == [
        (by, str(shape)) for shape in _shapes(tower) for by in ("babeltower", "PyTorch")
    ]
    for line in speeds:
        assert line["unit_vectors"] is True
        assert set(line["samples"]) == {"device", "call", "wall"}  # type: ignore[call-overload]


def _shapes(tower: TimedTower) -> tuple[object, ...]:
    from bench.gpu.towers import shapes_of

    return shapes_of(tower, dry=True)


def test_a_sample_is_judged_against_itself(
    bench: Bench, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.work / "samples"
    folder.mkdir()
    (folder / "repository").symlink_to(exported("capivara").parent)
    monkeypatch.setattr(gate, "sample_retrieval_set", lambda _: _few())
    (model,) = [model for model in models_of(Bench(*_folders(bench), False, 0)) if model.name == "capivara"]
    for form in gate._forms(bench):
        embed_model(bench, model.name, form)
    judge_model(bench, model.name, gate._forms(bench))
    (found,) = [line for line in lines(bench) if line["step"] == "gate"]
    assert (found["model"], found["form"], found["passes"]) == ("capivara", "again", True)
    assert found["faults"] == []


def test_graphs_for_cuda_are_judged_in_simulation(
    bench: Bench, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("capivara")
    repository = bench.work / "samples" / "repository"
    repository.mkdir(parents=True)
    for path in source.parent.glob("capivara[_.]*"):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, repository / path.name)
    _add_cuda(repository / "capivara")
    monkeypatch.setattr(gate, "sample_retrieval_set", lambda _: _few())
    forms = [gate.REFERENCE, *map(simulated_form, SIMULATED)]
    for form in forms[1:]:
        simulated_model(repository / "capivara", repository.parent / form.folder, form.precision)
    for form in forms:
        embed_model(bench, "capivara", form)
    judge_model(bench, "capivara", forms)
    fp16, bf16 = [line for line in lines(bench) if line["step"] == "gate"]
    assert (fp16["form"], bf16["form"]) == ("simulated fp16", "simulated bf16")
    assert fp16["faults"] == bf16["faults"] == []
    assert 0.99 < bf16["text_cosine_min"] < fp16["text_cosine_min"] < 0.9999999  # type: ignore[operator]


def _folders(bench: Bench) -> tuple[Path, Path, Path]:
    return bench.bundle, bench.out, bench.work


def _few() -> RetrievalSet:
    from export.retrieval.sample_set import sample_retrieval_set

    whole = sample_retrieval_set().select(["por_Latn"])
    (captions,) = whole.captions
    part = replace(captions, texts=captions.texts[:20], image_of=captions.image_of[:20])
    return replace(whole, images=whole.images[: max(part.image_of) + 1], captions=(part,))


def test_a_step_that_fails_or_hangs_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.json").write_text(json.dumps({"commit": "abc"}))
    monkeypatch.setattr(run, "unpack", lambda *_, **__: None)
    steps = (run.GpuStep("unknown", 60), run.GpuStep("machine", 60), run.GpuStep("record", 60))
    monkeypatch.setattr(run, "STEPS", steps)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    failed = run.run_steps(tmp_path, tmp_path / "out", tmp_path / "work", minutes=5, dry=True, only=[])
    said = capfd.readouterr().out
    assert failed == 1
    assert "unknown: failed with exit code 1" in said
    assert "machine: done" in said
    assert "record: done" in said
    assert (tmp_path / "out" / "gpu.json").is_file()


def command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("mine", encoding="utf-8")
    other.mkdir()
    (other / "mine").touch()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}", encoding="utf-8")
    for arguments, said in (
        (("bundle", "--out", str(file)), "is not a bundle, so it is not replaced"),
        (("bundle", "--out", str(other)), "is not a bundle, so it is not replaced"),
        (("run", str(other), str(tmp_path / "out")), "is not a bundle: it has no bundle.json"),
        (("run", str(bundle), str(file)), "is a file; pass a folder for the results"),
        (("run", str(bundle), str(tmp_path / "out"), "--only", "gates"), "Step 'gates' is unknown"),
    ):
        code, output = command(*arguments)
        assert code == 1
        assert said in " ".join(output.split())
        assert "Traceback" not in output
    assert file.read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file", "other"]


def test_tensorrt_is_a_command_of_its_own() -> None:
    code, output = command("tensorrt", "--help")
    assert code == 0, output
    assert "--no-samples" in output
