"""Steps of the run on a GPU, on the processor with tiny towers: the same code writes the same lines."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_models import ROOT, Exported

from bench.gpu import gate, run
from bench.gpu.comparison import packed_ratios
from bench.gpu.gate import embed_model, judge_model, models_of
from bench.gpu.lines import Bench, read_lines
from bench.gpu.results import records_of_line
from bench.gpu.samples import _add_cuda
from bench.gpu.simulated import SIMULATED, simulated_form, simulated_model
from bench.gpu.skeletons import require_activation, skeleton_from_graph
from bench.gpu.speed import write_graphs
from bench.gpu.towers import DRY_TOWERS, TOWERS, TimedTower
from bench.gpu.turns import Turn
from export.retrieval.sets import RetrievalSet
from runtime.errors import BabeltowerError
from runtime.manifest import Manifest, Modality


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("bench.gpu.lines._MEMORY", tmp_path / "none")
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Bench(tmp_path, tmp_path / "out", tmp_path / "work", dry=True, ends_at=time.time() + 600)


def lines(bench: Bench) -> list[dict[str, object]]:
    return list(read_lines(bench.out / "gpu.jsonl"))


@pytest.mark.parametrize("tower", DRY_TOWERS, ids=lambda tower: tower.slug)
def test_pytorch_has_the_activations_of_the_graph(
    tower: TimedTower, bench: Bench, exported: Exported
) -> None:
    model = exported(tower.variant)
    files = Manifest.read(model).variants["fp32"].tower(tower.modality)
    skeleton = bench.skeleton(tower.slug)
    skeleton_from_graph(model.parent / files.model / str(files.version) / files.graph, skeleton)
    require_activation(skeleton, tower)
    for other in {"gelu", "quick_gelu", "relu"} - {tower.activation}:
        with pytest.raises(BabeltowerError, match=f"declared with '{other}'"):
            require_activation(skeleton, replace(tower, activation=other))


@pytest.mark.parametrize("tower", [*TOWERS, *DRY_TOWERS], ids=lambda tower: tower.slug)
def test_pytorch_has_the_declared_activation_in_every_layer(tower: TimedTower) -> None:
    import torch

    from bench.gpu.peers import torch_tower

    classes = {"gelu": "GELUActivation", "quick_gelu": "QuickGELUActivation", "relu": "ReLU"}
    modules = torch_tower(tower, device="meta", dtype=torch.float16).modules()
    found = [name for module in modules if (name := type(module).__name__) in classes.values()]
    assert found == [classes[tower.activation]] * tower.layers


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
    packed = [line for line in speeds if line["by"] == "babeltower, packed texts"]
    captions = [line for line in speeds if line["load"] == "captions"]
    speeds = [line for line in speeds if line not in (*packed, *captions)]
    if tower.modality is Modality.TEXT:
        _check_packed(packed, captions, [str(shape) for shape in _shapes(tower)])
    else:
        assert packed == captions == []
    shapes, plain = [str(shape) for shape in _shapes(tower)], "PyTorch, plain attention"
    assert [(line["by"], line["shape"]) for line in speeds] == [
        *((by, shape) for shape in shapes for by in ("babeltower", "PyTorch")),
        *((plain, shape) for shape in shapes),
    ]
    for line in speeds:
        metrics = {"device"} if line["by"] == plain else {"device", "call", "wall"}
        assert line["unit_vectors"] is True
        assert set(line["samples"]) == metrics  # type: ignore[call-overload]
        assert (line["n_tokens"] == line["rows"] * line["tokens"]) is (line["load"] == "")  # type: ignore[operator]


def _check_packed(packed: list[dict[str, Any]], captions: list[dict[str, Any]], shapes: list[str]) -> None:
    """The packed form is timed in every shape, and both forms in the captions of a corpus."""
    assert [line["shape"] for line in packed] == ["64 captions", *shapes]
    assert all(line["detail"]["packed"] for line in packed[1:])
    assert [line["by"] for line in captions] == ["babeltower", "babeltower, packed texts"]
    padded_run, packed_run = (line["detail"] for line in captions)
    assert padded_run["padded_tokens"] >= captions[0]["n_tokens"] > 64 * 10
    assert packed_run["runs"] <= padded_run["runs"]
    for line in captions:
        assert set(line["samples"]) == {"wall"}
        assert line["unit_vectors"] is True
    records = [record for line in (*packed, *captions) for record in records_of_line(line)]
    (ratio,) = packed_ratios(records)
    assert (ratio.shape, ratio.metric) == ("64 captions", "wall")
    assert ratio.ratio == pytest.approx(ratio.padded_ms / ratio.packed_ms)


def test_pytorch_computes_the_same_vectors_by_every_way(bench: Bench) -> None:
    import torch

    from bench.gpu.tower_times import _Peers
    from bench.gpu.towers import random_inputs

    tower = DRY_TOWERS[1]
    with torch.inference_mode():
        peers = _Peers(tower, "cpu")
        peers.plain.load_state_dict(peers.module.state_dict())
        first, second = (random_inputs(tower, _shapes(tower)[1], seed=seed) for seed in (0, 1))  # type: ignore[arg-type]
        (eager,), (plain,) = (
            list(peers.contenders(first, compiled=False)),
            list(peers.with_plain_attention(first)),
        )
        vectors = eager.from_host()
        assert np.allclose(vectors, peers.module(**peers.on_device(first)).numpy(), atol=1e-5)
        assert np.allclose(vectors, plain.from_host(), atol=1e-5)
        (other,) = list(peers.contenders(second, compiled=False))
        assert not np.allclose(vectors, other.from_host(), atol=1e-2)
    assert (eager.detail["attention"], plain.detail["attention"]) == ("scaled_dot_product_attention", "eager")
    kinds = {
        name: module.encoder.config._attn_implementation
        for name, module in vars(peers).items()
        if name in ("module", "plain")
    }
    assert kinds == {"module": "sdpa", "plain": "eager"}


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
    packed = simulated_form(gate.PACKED_PRECISION, packed=True)
    forms = [gate.REFERENCE, *map(simulated_form, SIMULATED), packed]
    for form in forms[1:]:
        source = repository / (gate.PACKED if form is packed else "") / "capivara"
        simulated_model(source, repository.parent / form.folder, form.precision)
    for form in forms:
        embed_model(bench, "capivara", form)
    judge_model(bench, "capivara", forms)
    fp16, bf16, unpadded = [line for line in lines(bench) if line["step"] == "gate"]
    assert (fp16["form"], bf16["form"]) == ("simulated fp16", "simulated bf16")
    assert unpadded["form"] == "simulated fp16 packed"
    assert fp16["faults"] == bf16["faults"] == unpadded["faults"] == []
    assert 0.9998 < unpadded["text_cosine_min"] < 0.9999999  # type: ignore[operator]
    assert unpadded["image_cosine_min"] == fp16["image_cosine_min"]
    found = Manifest.read(repository / gate.PACKED / "capivara").variants["fp16_cuda"]
    assert found.packs_text
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


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundle without parts, whose run takes whatever ``work`` holds."""
    monkeypatch.setattr("bench.gpu.lines._MEMORY", tmp_path / "memory")
    monkeypatch.setattr(run, "unpack", lambda *_, **__: None)
    (tmp_path / "bundle.json").write_text(json.dumps({"commit": "abc"}))
    return tmp_path


@pytest.mark.parametrize(
    ("only", "minutes", "late"),
    [
        (["smoke", "gate", "record"], 5, "record"),
        (["gate", "autotune"], 5, "autotune"),
        (["gate"], 5, None),
        (["gate", "speed", "autotune"], 0.3, None),
    ],
    ids=["before the record", "before another", "at the end", "no time left for times"],
)
def test_steps_beside_end_before_what_follows_and_count(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: list[str],
    minutes: float,
    late: str | None,
) -> None:
    begun: list[str] = []
    too_early = threading.Event()

    def run_step(name: str, *_: object, **__: object) -> str:
        begun.append(name)
        if name == "gate":
            return "met another step" if too_early.wait(0.3) else "failed with exit code 1"
        if name == late:
            too_early.set()
        return "done"

    monkeypatch.setattr(run, "_run", run_step)
    if minutes < 1:  # the gate still begins, and then there is no time left for what follows
        times = itertools.chain([0.0, 0.0, 0.0], itertools.repeat(60.0))
        monkeypatch.setattr("bench.gpu.run.time.time", lambda: next(times))
        minutes = 1
    out, work = bundle / "out", bundle / "work"
    assert run.run_steps(bundle, out, work, minutes=minutes, dry=True, only=only) == 1
    said = capsys.readouterr().out
    assert "gate: failed with exit code 1" in said
    assert set(begun) == set(only) - ({"speed", "autotune"} if late is None else set())
    assert (work / "quiet").exists()


def test_times_are_prepared_beside_and_taken_in_quiet(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = bundle / "work" / "quiet"
    speed_begun = threading.Event()

    def run_step(name: str, *_: object, **__: object) -> str:
        if name == "gate":
            return "done" if speed_begun.wait(60) and not quiet.exists() else "failed"
        speed_begun.set()
        while not quiet.exists():
            time.sleep(0.01)
        return "done"

    monkeypatch.setattr(run, "_run", run_step)
    only = ["gate", "speed"]
    assert run.run_steps(bundle, bundle / "out", bundle / "work", minutes=5, dry=True, only=only) == 0


def test_a_second_run_takes_nothing_from_the_first(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = bundle / "out", bundle / "work"
    left = [
        work / "vectors" / "capivara-cuda-fp16.npz",
        work / "smoke" / "tiny-vit.onnx",
        work / "graphs" / "vit-b32.data",
        work / "samples" / "repository" / "other.json",
        bundle / "memory" / "babeltower-gpu" / "vit-b32.data",
    ]
    for file in (*left, work / "site" / "kept"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(run, "_run", lambda *_, **__: "done")

    def run_again(*only: str) -> list[str]:
        run.run_steps(bundle, out, work, minutes=5, dry=True, only=list(only))
        return sorted(path.name for path in out.iterdir())

    out.mkdir()
    for name in ("gpu.jsonl", "gpu.json"):
        (out / name).write_text("{}\n", encoding="utf-8")
    assert run_again("record") == ["gpu.json", "gpu.jsonl"]
    assert run_again("gate") == ["earlier-1-gpu.json", "earlier-1-gpu.jsonl"]
    assert f"an earlier run's results are now {out / 'earlier-1-gpu.jsonl'}" in capsys.readouterr().out
    (out / "gpu.jsonl").touch()
    assert run_again("gate") == ["earlier-1-gpu.json", "earlier-1-gpu.jsonl", "earlier-2-gpu.jsonl"]
    assert not [file for file in left if file.exists()]
    assert (work / "site" / "kept").exists()


def test_a_form_is_judged_while_a_later_one_never_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def process(part: str) -> subprocess.Popen[bytes]:
        started.append(part)
        return subprocess.Popen(["sleep", "600"] if part == "model/cuda fp32" else ["true"])

    monkeypatch.setattr(gate, "_process", process)
    monkeypatch.setattr(gate, "models_of", lambda _: [Path("model")])
    gate.judge_all(replace(bench, dry=False, ends_at=time.time() + 5))
    assert started[:2] == ["model/reference", "model/cuda fp16"]
    assert sorted(started[2:]) == [
        "model/cuda bf16",
        "model/cuda bf16/verdict",
        "model/cuda fp16 packed",
        "model/cuda fp16 packed/verdict",
        "model/cuda fp16/verdict",
        "model/cuda fp32",
    ]
    (line,) = lines(bench)
    assert line["error"] == "out of time; not done: model/cuda fp32, model/cuda fp32/verdict"


def test_the_gate_judges_in_processes(
    bench: Bench, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.precision.calibration import samples_folder

    source, repository = exported("capivara"), bench.work / "samples" / "repository"
    repository.mkdir(parents=True)
    for path in source.parent.glob("capivara[_.]*"):
        (repository / path.name).symlink_to(path)
    (bench.work / "samples" / "emoji").symlink_to(samples_folder())
    folders = [str(folder) for folder in _folders(bench)]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "step", "gate", *folders, str(bench.ends_at), "--dry"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    gate.judge_all(bench)
    assert not [line for line in lines(bench) if "error" in line]
    (found,) = [line for line in lines(bench) if line["step"] == "gate"]
    assert (found["model"], found["form"], found["passes"]) == ("capivara", "again", True)


def test_a_tower_whose_time_is_over_takes_none_of_the_next_ones(bench: Bench, exported: Exported) -> None:
    from bench.gpu.tower_times import prepare_and_time

    tower = DRY_TOWERS[1]
    model = exported(tower.variant)
    files = Manifest.read(model).variants["fp32"].tower(tower.modality)
    skeleton_from_graph(
        model.parent / files.model / str(files.version) / files.graph, bench.skeleton(tower.slug)
    )
    write_graphs(bench, tower.slug)
    Turn.of(bench, tower.slug).begin(time.time() - 1)
    prepare_and_time(bench, tower.slug, until=0)
    (line,) = [line for line in lines(bench) if line["step"] == "speed"]
    assert line["error"] == "out of the tower's time; left out: 1×8, 4×16 ragged"


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
        (
            (
                "simulate",
                "--form",
                "int8",
                "--work",
                str(tmp_path / "work"),
                "--json",
                str(tmp_path / "r.json"),
            ),
            "Form 'int8' is unknown; expected some of ['fp16', 'bf16', 'packed']",
        ),
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
