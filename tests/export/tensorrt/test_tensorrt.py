"""Variants for TensorRT: exported, judged by the gate, opened and embedded with, as far as no GPU is needed.

The library and the GPU are stand-ins that compute with ONNX Runtime (``tensorrt_double``); the configuration
that Triton reads is parsed with Triton's own schema.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from altered_models import copied
from google.protobuf import text_format
from sample_models import CHECKPOINTS
from small_exports import FEW
from stock_backends import require_accepted
from tensorrt_double import RunningTensorRt, install
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from export import repository_from_checkpoint
from export.parity.limits import limits_of
from export.repository import Export
from export.variants import forms_for
from runtime import Encoder
from runtime.backends.plans import PlanManifest
from runtime.commands.app import app
from runtime.errors import EngineError, ExportError, ManifestError, OpeningCheckError, ParityError
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Manifest, Modality, Precision, sha256_of_file
from runtime.opening.tower_check import Checks

NAME = "capivara"
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)
DTYPES = {
    Precision.FP32: "Float",
    Precision.FP16: "Half",
    Precision.BF16: "BFloat16",
    Precision.INT8: "Int8",
}
TENSORRT = {"engine": Engine.TENSORRT}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RunningTensorRt:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """One sample in every precision but FP8, which its small text tower does not bear."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        forms = forms_for(PRECISIONS, [Engine.TENSORRT], installed=[Engine.TENSORRT])
        repository = tmp_path_factory.mktemp("planned") / "repository"
        return repository_from_checkpoint(
            CHECKPOINTS / NAME, repository, name=NAME, options=replace(FEW, forms=forms)
        )


def folder_of(planned: Export, modality: Modality, precision: Precision) -> Path:
    tower = planned.manifest.variant(precision, "tensorrt").tower(modality)
    return planned.model.parent / tower.model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_variant_is_published_under_its_engine_with_its_evidence(
    precision: Precision, planned: Export
) -> None:
    variant = planned.manifest.variants[f"{precision.value}_tensorrt"]
    assert variant.engines == ("tensorrt",)
    assert set(variant.parity["engines"]) == {"tensorrt 10.16.1"}
    for modality in Modality:
        recipe = variant.recipe[modality.value]
        assert recipe["gpu"] == "NVIDIA L4"
        assert len(recipe["profiles"]) == (5 if modality is Modality.TEXT else 3)
        assert set(recipe["products"]) == {DTYPES[precision]}
        assert recipe["runs_on"] == "TensorRT 10.16.1 alone"
        assert recipe["portability"] == "none"
    with pytest.raises(ManifestError, match="was not measured on onnxruntime"):
        planned.manifest.variant(precision, "onnxruntime")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("modality", Modality)
def test_a_tower_is_a_plan_its_manifest_and_the_graph_beside_it(
    modality: Modality, precision: Precision, planned: Export
) -> None:
    folder = folder_of(planned, modality, precision)
    version = {path.name for path in (folder / "1").iterdir()}
    assert version == {"model.plan", "model.plan.json", "model.onnx", "opening.npz"}
    plan = PlanManifest.read(folder / "1" / "model.plan")
    assert (plan.precision, plan.onnx) == (precision.value, "model.onnx")
    tower = planned.manifest.variant(precision, "tensorrt").tower(modality)
    assert tower.graph == "model.plan"
    on_disk = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {record.path for record in tower.files} == on_disk


@pytest.mark.parametrize("modality", Modality)
def test_triton_is_told_the_profiles_and_warms_up_each(modality: Modality, planned: Export) -> None:
    folder = folder_of(planned, modality, Precision.FP16)
    text = (folder / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.default_model_filename == "model.plan"
    (group,) = config.instance_group
    plan = PlanManifest.read(folder / "1" / "model.plan")
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == [str(index) for index in range(len(plan.profiles))]
    assert config.max_batch_size == max(profile.dims["batch"].most for profile in plan.profiles)
    assert require_accepted(folder) == config
    assert len(config.model_warmup) == len(plan.profiles)
    for warmup, profile in zip(config.model_warmup, plan.profiles, strict=True):
        assert set(warmup.inputs) == set(plan.inputs)
        for name, tensor in warmup.inputs.items():
            sizes = {"batch": warmup.batch_size, "sequence": tensor.dims[0]}
            assert profile.admits(sizes)
            n_bytes = int(np.prod(tensor.dims)) * np.dtype(plan.inputs[name].dtype).itemsize
            assert (folder / "warmup" / tensor.input_data_file).stat().st_size == n_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_text_alone_differs_from_the_batch_by_the_precision_s_rounding(
    precision: Precision, planned: Export
) -> None:
    """INT8 too: its sums are exact on a CPU only."""
    (figures,) = planned.manifest.variants[f"{precision.value}_tensorrt"].parity["engines"].values()
    assert 0 < figures["row_alone"] <= limits_of(precision, Engine.TENSORRT).max_row_error
    if precision is Precision.INT8:
        assert figures["row_alone"] > limits_of(precision, Engine.ONNXRUNTIME).max_row_error


def test_more_rows_than_a_profile_holds_go_in_parts(planned: Export, library: RunningTensorRt) -> None:
    texts = [f"um gato {i}" for i in range(150)]
    with Encoder.open(planned.model, **TENSORRT, precision="fp32") as encoder:
        together = encoder.embed_texts(texts, "pt", max_batch_tokens=100_000)
        apart = np.concatenate([encoder.embed_texts([text], "pt") for text in texts[::30]])
    np.testing.assert_allclose(together[::30], apart, atol=1e-5)


def test_another_gpu_refuses_the_plan(planned: Export, library: RunningTensorRt) -> None:
    library.__version__ = "10.9.0"
    with (
        Encoder.open(planned.model, **TENSORRT, precision="fp16") as encoder,
        pytest.raises(EngineError, match=r"built with TensorRT 10\.16\.1; 10\.9\.0 is installed"),
    ):
        encoder.embed_texts(["gato"], "pt")


def test_a_compiler_that_builds_fp32_publishes_nothing(library: RunningTensorRt, tmp_path: Path) -> None:
    library.listed = "Float"
    forms = forms_for([Precision.FP16], [Engine.TENSORRT], installed=[Engine.TENSORRT])
    with pytest.raises(ExportError, match=r"should compute in Half.*did not keep the graph's precision"):
        repository_from_checkpoint(
            CHECKPOINTS / NAME, tmp_path / "r", name=NAME, options=replace(FEW, forms=forms)
        )
    assert not (tmp_path / "r").exists()


def test_the_gate_judges_plans_too(library: RunningTensorRt, tmp_path: Path) -> None:
    library.noise = 0.3
    forms = forms_for([Precision.FP16], [Engine.TENSORRT], installed=[Engine.TENSORRT])
    with pytest.raises(ParityError, match="fp16_tensorrt does not agree with PyTorch"):
        repository_from_checkpoint(CHECKPOINTS / NAME, tmp_path, name=NAME, options=replace(FEW, forms=forms))
    assert (tmp_path / f"{NAME}.fp16_tensorrt.refused.json").is_file()
    assert not (tmp_path / f"{NAME}.babeltower.json").exists()


def test_the_gate_judges_fp8_in_simulation(
    library: RunningTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime rounds to E4M3 on a CPU, which texts, 64 wide, show more than images."""
    options = replace(FEW, forms=forms_for([Precision.FP8], [Engine.TENSORRT], installed=[Engine.TENSORRT]))
    limits = limits_of(Precision.FP8, Engine.TENSORRT)
    narrow = replace(limits, retrieval=replace(limits.retrieval, min_mean_cosine=0.995))
    with monkeypatch.context() as patched:
        patched.setattr("export.repository.limits_of", lambda *_: narrow)
        with pytest.raises(ParityError, match=r"fp8_tensorrt does not agree .*texts in .*: mean cosine 0\.9"):
            repository_from_checkpoint(CHECKPOINTS / NAME, tmp_path, name=NAME, options=options)
    refused = json.loads((tmp_path / f"{NAME}.fp8_tensorrt.refused.json").read_text())
    repository_from_checkpoint(CHECKPOINTS / NAME, tmp_path, name=NAME, options=options)
    manifest = json.loads((tmp_path / f"{NAME}.babeltower.json").read_text())
    (retrieval,) = manifest["variants"]["fp8_tensorrt"]["parity"]["retrieval"].values()
    assert retrieval == next(iter(refused["retrieval"].values()))
    assert 0.995 < retrieval["images"]["cosine_mean"] < 0.9999
    texts = [language["cosine_mean"] for language in retrieval["languages"].values()]
    assert 0.98 < sum(texts) / len(texts) < 0.995


@pytest.mark.parametrize(
    ("missing", "message"),
    [("tensorrt", "TensorRT|tensorrt is not installed"), ("gpu", "GPU 0 is not available")],
)
def test_without_a_gpu_the_export_ends_before_it_begins(
    missing: str, message: str, library: RunningTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = forms_for([Precision.FP16], [Engine.TENSORRT], installed=[Engine.TENSORRT])
    if missing == "gpu":
        monkeypatch.setattr(library.gpu, "_n_devices", 0)
    else:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=rf"{message}.*--engine onnxruntime"):
        repository_from_checkpoint(
            tmp_path / "no checkpoint", tmp_path / "r", name=NAME, options=replace(FEW, forms=forms)
        )
    assert not (tmp_path / "r").exists()


def test_the_command_names_the_remedy_where_tensorrt_is_missing(tmp_path: Path) -> None:
    if Engine.TENSORRT.value in sys.modules:
        pytest.skip("TensorRT is installed here")
    arguments = ["export", str(CHECKPOINTS / NAME), str(tmp_path / "r"), "--precision", "fp16"]
    done = CliRunner().invoke(app, [*arguments, "--engine", "tensorrt"])
    assert done.exit_code == 1
    assert "Engine tensorrt is not installed" in done.output
    assert not (tmp_path / "r").exists()


def test_the_command_publishes_a_plan(library: RunningTensorRt, tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / NAME), str(tmp_path / "r"), "--precision", "fp16"]
    arguments += ["--engine", "tensorrt", "--captions-per-language", "8", "--json"]
    arguments += ["--tensorrt-version-compatible", "--tensorrt-workspace", "512"]
    arguments += ["--tensorrt-hardware-compatibility", "ampere-plus", "--tensorrt-optimization-level", "4"]
    cache = tmp_path / "timings" / "ada.cache"
    done = CliRunner().invoke(
        app, [*arguments, "--tensorrt-timing-cache", str(cache)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert {("set", "vc"), ("workspace", 512 << 20)} <= set(library.asked)
    assert library.config.builder_optimization_level == 4
    assert library.config.hardware_compatibility_level == "ampere"
    assert cache.read_bytes() == b"t"
    manifest = Manifest.read(tmp_path / "r" / NAME)
    (variant,) = manifest.variants.values()
    for modality in Modality:
        recipe = variant.recipe[modality.value]
        assert recipe["runs_on"] == "TensorRT 10.16.1 and later releases of 10.x"
        assert recipe["serve_with"] == "--backend-config=tensorrt,version-compatible=true"
        assert recipe["portability"] == "ampere-plus"
        assert recipe["options"]["workspace_bytes"] == 512 << 20
        assert recipe["options"]["optimization_level"] == 4
        tower = variant.tower(modality)
        plan = PlanManifest.read(tmp_path / "r" / tower.model / "1" / tower.graph)
        assert plan.version_compatible
        assert (plan.runs_on, plan.serve_with) == (recipe["runs_on"], recipe["serve_with"])
    library.__version__ = "10.17.0"
    opened(tmp_path / "r" / NAME)


def test_tensorrt_options_without_a_plan_to_build_are_refused(tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / NAME), str(tmp_path / "r"), "--tensorrt-version-compatible"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "add --engine tensorrt" in done.output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("option", "value"), [("workspace", "0"), ("optimization-level", "6")])
def test_tensorrt_options_out_of_range_are_refused(option: str, value: str, tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / NAME), str(tmp_path / "r"), "--engine", "tensorrt"]
    done = CliRunner().invoke(app, [*arguments, f"--tensorrt-{option}", value])
    assert done.exit_code == 2
    assert not (tmp_path / "r").exists()


def opened(model: Path, **arguments: object) -> None:
    with LocalEncoder.from_repository(model, engine="tensorrt", precision="fp16", **arguments) as encoder:
        for modality in Modality:
            encoder.open_tower(modality)


def test_a_plan_that_computes_otherwise_on_this_gpu_is_refused(
    library: RunningTensorRt, planned: Export
) -> None:
    opened(planned.model)
    library.noise = 0.02
    with pytest.raises(
        OpeningCheckError, match=r"capivara_text_tower_fp16_tensorrt does not reproduce"
    ) as error:
        opened(planned.model)
    assert "precision='fp32' with engine='tensorrt'" in str(error.value)


@pytest.mark.parametrize("stale", ["graph", "plan", "weights"])
def test_a_stale_plan_is_refused(
    stale: str, library: RunningTensorRt, planned: Export, tmp_path: Path
) -> None:
    """A plan of an older export in place of the one that was measured, whole with its own manifest."""
    model = copied(planned.model, tmp_path / "r")
    plan = folder_of(planned, Modality.TEXT, Precision.FP16).name
    path = model.parent / plan / "1" / "model.plan"
    manifest = PlanManifest.read(path)
    if stale == "plan":
        path.write_bytes(path.read_bytes() + b"\n")
        facts = {"plan_sha256": sha256_of_file(path), "plan_bytes": path.stat().st_size}
        replace(manifest, **facts).write(path)
    elif stale == "graph":
        replace(manifest, onnx_sha256="0" * 64).write(path)
    else:
        replace(manifest, onnx_data={"other.data": "0" * 64}).write(path)
    with pytest.raises(ManifestError, match=r"model\.plan.* (has sha256|bytes)"):
        opened(model)
    said = "is another plan" if stale == "plan" else "was built from another"
    with pytest.raises(EngineError, match=rf"{said}.*It is stale"):
        opened(model, verify=Checks.OPENING)


def test_a_plan_of_another_library_is_refused(
    library: RunningTensorRt, planned: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "__version__", "10.9.0")
    with pytest.raises(EngineError, match=r"built with TensorRT 10\.16\.1; 10\.9\.0 is installed"):
        opened(planned.model)
