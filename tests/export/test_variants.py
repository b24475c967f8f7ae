"""Variants: what may be asked for, what is published, and what the gate refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_needs import (
    CPU_ENGINES,
    LOWER_FORMS,
    form_params,
    forms_here,
    int8_engine_params,
)
from sample_models import CHECKPOINTS, NAMES, Exported
from small_exports import FEW
from stock_backends import require_accepted
from typer.testing import CliRunner

from export import repository_from_checkpoint
from export.parity.limits import Limits, limits_of
from export.precision.clipping import ClipMethod
from export.precision.int8 import GraphTarget, Int8Recipe
from export.repository import ExportOptions, installed_engines
from export.variants import forms_for, possible_forms
from runtime import Encoder
from runtime.commands.app import app
from runtime.errors import EngineError, ExportError, ManifestError, ParityError
from runtime.machine import cpu_model, instruction_sets
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Modality, Precision, manifest_path
from runtime.triton_config import engine_of_config_text, text_from_config

CPU = CPU_ENGINES


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Sample name → REPOSITORY/NAME in every precision but FP32, exported at its first use."""
    repository = tmp_path_factory.mktemp("lowered") / "repository"

    def model_of(name: str) -> Path:
        if not manifest_path(repository / name).is_file():
            options = replace(FEW, forms=forms_here())
            repository_from_checkpoint(CHECKPOINTS / name, repository, name=name, options=options)
        return repository / name

    return model_of


@pytest.mark.parametrize("form", form_params())
@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_every_family_is_published_with_its_evidence(
    name: str, form, lowered: Exported
) -> None:
    model = lowered(name)
    variant = Manifest.read(model).variants[form.key]
    assert variant.precision is form.precision
    assert variant.engines == tuple(engine.value for engine in form.opened_by)
    assert variant.text.model == f"{name}_text_tower_{form.key}"
    for tower in (variant.text, variant.image):
        text = text_from_config(require_accepted(model.parent / tower.model))
        assert engine_of_config_text(text, origin=tower.model) is form.opened_by[0]
    assert variant.parity["limits"]["retrieval"]["sampled"] is True
    for figures in variant.parity["retrieval"].values():
        assert len(figures["languages"]) >= 90
        for language in figures["languages"].values():
            assert language["text_to_image"]["reference"].keys() == {"1", "5", "10"}
    assert variant.parity["noise"]["min_cosine"] > 0.999999
    if form.precision is Precision.INT8:
        assert all(recipe["int8_share"] >= 0.95 for recipe in variant.recipe.values())
        assert variant.recipe.keys() == {"text", "image"}
    if form.needs_calibration:
        assert len(variant.calibration["sha256"]) == 64
        assert len(variant.calibration["languages"]) >= 80


@pytest.mark.parametrize("form", form_params())
@pytest.mark.parametrize("name", NAMES)
def test_a_text_alone_equals_the_text_in_a_batch(name: str, form, lowered: Exported) -> None:
    texts = [
        "gato",
        "un gato muy grande duerme en la silla",
        "猫",
        "قطة سوداء",
        "x " * 90,
        "e\u0301",
        "🐈 cat",
    ]
    code = "spa_Latn"
    with Encoder.open(
        lowered(name), engine=form.opened_by[0], precision=form.precision, threads=1
    ) as encoder:
        batched = encoder.embed_texts(texts, code)
        alone = np.concatenate([encoder.embed_texts([text], code) for text in texts])
    assert np.abs(alone - batched).max() <= limits_of(form.precision, form.opened_by[0]).max_row_error


@pytest.mark.parametrize("engine", int8_engine_params())
@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_equals_the_image_in_a_batch_in_int8(
    name: str, engine: Engine, lowered: Exported
) -> None:
    random = np.random.default_rng(3)
    images = [random.integers(0, 256, (60 + 9 * i, 80, 3), dtype=np.uint8) for i in range(7)]
    with Encoder.open(lowered(name), engine=engine, precision="int8", threads=1) as encoder:
        batched = encoder.embed_images(images)
        alone = np.concatenate([encoder.embed_images([image]) for image in images])
    assert np.abs(alone - batched).max() <= 1e-6


def test_a_precision_opens_on_the_engines_it_was_measured_on_alone(lowered: Exported) -> None:
    model = lowered("capivara")
    with pytest.raises(ManifestError, match=r"fp16 was not measured on openvino.*'fp16': \['onnxruntime'\]"):
        Encoder.open(model, engine="openvino", precision="fp16")
    with pytest.raises(ManifestError, match=r"has no fp32 variant.*--precision fp32"):
        Encoder.open(model)
    manifest = Manifest.read(model)
    other = replace(manifest.variants["int8_onnxruntime"], engines=("openvino",))
    both = replace(manifest, variants={**manifest.variants, "int8_openvino": other})
    with pytest.raises(ManifestError, match="pass the engine too"):
        both.variant(Precision.INT8)


def test_an_unfit_int8_is_refused_and_the_report_names_the_worst_languages(tmp_path: Path) -> None:
    clipped = Int8Recipe(target=GraphTarget.ONNXRUNTIME, method=ClipMethod.PERCENTILE, percentile=90)
    options = replace(FEW, forms=forms_for([Precision.INT8], [Engine.ONNXRUNTIME], installed=CPU))
    with pytest.raises(
        ParityError,
        match=r"int8_onnxruntime does not agree .*mean over 106 languages.*Largest drops of R@1: \w{3}_",
    ):
        repository_from_checkpoint(
            CHECKPOINTS / "capivara",
            tmp_path,
            name="m",
            options=replace(options, recipes=dict.fromkeys(Modality, clipped)),
        )
    record = json.loads((tmp_path / "m.int8_onnxruntime.refused.json").read_text())
    worst = [
        violation for violation in record["violations"] if "_to_" in violation and "mean" not in violation
    ]
    assert len(worst) > 10
    assert "onnxruntime" in record["worst_languages"][0]
    (figures,) = record["retrieval"].values()
    sides = figures["languages"].items()
    drops = {code: entry["text_to_image"] for code, entry in sides}
    first = worst[0].split(": ")[1].split(",")[0]
    assert drops[first]["reference"]["1"] - drops[first]["exported"]["1"] > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.int8_onnxruntime.refused.json"]


def test_one_refused_variant_does_not_keep_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import repository as repository_module

    def strict(precision: Precision, engine: Engine) -> Limits:
        limits = limits_of(precision, engine)
        return replace(limits, min_cosine=1.1) if precision is Precision.FP16 else limits

    monkeypatch.setattr(repository_module, "limits_of", strict)
    forms = forms_for([Precision.FP16, Precision.FP32], [Engine.ONNXRUNTIME], installed=CPU)
    refusal = r"fp16 does not agree.*Largest drops of R@1: .*Published variants: fp32"
    with pytest.raises(ParityError, match=refusal):
        repository_from_checkpoint(
            CHECKPOINTS / "capivara", tmp_path, name="m", options=replace(FEW, forms=forms)
        )
    manifest = Manifest.read(tmp_path / "m")
    assert list(manifest.variants) == ["fp32"]
    manifest.verify(tmp_path, manifest.variants["fp32"])


def test_an_accepted_drop_is_recorded() -> None:
    own = limits_of(Precision.INT8, Engine.ONNXRUNTIME)
    limits = own.accepting(0.02)
    assert (limits.accepted_drop, limits.retrieval.max_mean_drop) == (0.02, 0.02)
    assert (limits.retrieval.max_recall_drop, limits.retrieval.max_later_recall_drop) == (0.02, 0.02)
    assert own.accepting(0.001).retrieval == own.retrieval


@pytest.mark.parametrize("precision", Precision)
def test_a_gpu_s_rows_may_differ_by_the_precision_s_rounding(precision: Precision) -> None:
    """Kernels are chosen by the batch's shape there; on a CPU, INT8 sums are exact."""
    cpu = limits_of(precision, Engine.OPENVINO)
    assert cpu == limits_of(precision, Engine.ONNXRUNTIME)
    for engine in GPU_ENGINES:
        gpu = limits_of(precision, engine)
        assert gpu.max_row_error >= cpu.max_row_error
        assert (gpu.min_cosine, gpu.max_abs_error) == (cpu.min_cosine, cpu.max_abs_error)
        assert gpu.retrieval.max_recall_drop == cpu.retrieval.max_recall_drop
    assert limits_of(Precision.INT8, Engine.ONNXRUNTIME).max_row_error == 1e-6
    assert limits_of(Precision.INT8, Engine.TENSORRT).max_row_error == 0.02


def test_what_cannot_be_made_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"bf16 is not supported on \['onnxruntime'\].*openvino"):
        forms_for([Precision.BF16], [Engine.ONNXRUNTIME], installed=CPU)
    with pytest.raises(ExportError, match="openvino is not installed"):
        forms_for([Precision.INT8], [Engine.OPENVINO], installed=[Engine.ONNXRUNTIME])
    with pytest.raises(ExportError, match="captions_per_language=0 disables"):
        ExportOptions(forms=LOWER_FORMS, captions_per_language=0)


def test_every_cpu_engine_is_measured_here() -> None:
    assert set(CPU) <= set(installed_engines())
    keys = [form.key for form in forms_for([Precision.INT8, Precision.FP32], [], installed=CPU)]
    assert keys == ["int8_onnxruntime", "int8_openvino", "fp32"]


def test_nothing_is_built_for_a_gpu_unless_it_is_asked_for() -> None:
    """Else each export fails where TensorRT is installed without a GPU, and builds plans where one is."""
    installed = [*CPU, *GPU_ENGINES]
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8):
        for form in forms_for([precision], [], installed=installed):
            assert not set(form.opened_by) & set(GPU_ENGINES)
    asked = forms_for([Precision.FP16], [Engine.TENSORRT], installed=installed)
    assert [form.key for form in asked] == ["fp16_tensorrt"]
    with pytest.raises(ExportError, match=r"fp8 is not supported on .*only on .*tensorrt.*--engine"):
        forms_for([Precision.FP8], [], installed=installed)


def test_the_command_publishes_several_precisions(tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / "capivara"), str(tmp_path), "--precision", "int8"]
    arguments += ["--precision", "fp16", "--engine", "onnxruntime", "--captions-per-language", "8", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["parity"]) == {"int8_onnxruntime", "fp16"}
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    towers = [f"capivara_{m.value}_tower_{v}" for m in Modality for v in ("int8_onnxruntime", "fp16")]
    assert folders == sorted([*towers, "capivara_text", "capivara_image"])
    variant = Manifest.read(tmp_path / "capivara").variants["int8_onnxruntime"]
    assert variant.measured_on["cpu"] == cpu_model()
    assert variant.measured_on["instruction_sets"] == list(instruction_sets())
    for recipe in variant.recipe.values():
        assert (recipe["largest_weight_code"], recipe["rounding"]) == (64, "compensated")


NO_BF16 = "OpenVINO does not support bf16 on Some CPU (avx2)"


@pytest.fixture
def no_openvino_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which OpenVINO offers no BF16."""

    def require_computes(engine: Engine, precision: Precision) -> None:
        if (engine, precision) == (Engine.OPENVINO, Precision.BF16):
            raise EngineError(NO_BF16)

    monkeypatch.setattr("export.variants.require_computes", require_computes)


def test_a_form_that_the_processor_cannot_run_is_refused_and_the_others_published_wholly(
    tmp_path: Path, no_openvino_bf16: None
) -> None:
    arguments = ["export", str(CHECKPOINTS / "capivara"), str(tmp_path), "--precision", "bf16"]
    arguments += ["--precision", "fp32", "--captions-per-language", "8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"bf16_openvino cannot be built here: {NO_BF16}")
    assert "bf16_openvino cannot be built on this machine" in done.stderr.splitlines()[-1]
    manifest = Manifest.read(tmp_path / "capivara")
    assert list(manifest.variants) == ["fp32"]
    assert manifest.front_ends
    manifest.verify_front_ends(tmp_path)


def test_what_the_processor_cannot_run_is_refused_before_any_work(
    tmp_path: Path, no_openvino_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("export.repository.towers_from_checkpoint", work)
    forms = forms_for([Precision.FP32, Precision.BF16], [], installed=CPU)
    with pytest.raises(EngineError, match="does not support bf16 on Some CPU"):
        repository_from_checkpoint(
            CHECKPOINTS / "capivara", tmp_path / "r", options=replace(FEW, forms=forms)
        )
    arguments = ["export", str(CHECKPOINTS / "capivara"), str(tmp_path / "r"), "--precision", "bf16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "Nothing was exported" in done.stderr
    assert not (tmp_path / "r").exists()


def test_an_engine_nobody_named_is_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_computes(engine: Engine, precision: Precision) -> None:
        if (engine, precision) == (Engine.OPENVINO, Precision.INT8):
            raise EngineError("OpenVINO's int8 is not accurate on Some CPU.")

    monkeypatch.setattr("export.variants.require_computes", require_computes)
    arguments = ["export", str(CHECKPOINTS / "capivara"), str(tmp_path), "--precision", "int8"]
    done = CliRunner().invoke(app, [*arguments, "--captions-per-language", "8"])
    assert done.exit_code == 0, done.output
    assert "int8_openvino cannot be built here: OpenVINO's int8 is not accurate on Some CPU" in done.stderr
    assert list(Manifest.read(tmp_path / "capivara").variants) == ["int8_onnxruntime"]


def test_front_ends_are_written_where_a_later_form_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> dict[str, object]:
        raise EngineError("the second form broke")

    first, second = forms_for([Precision.FP32, Precision.FP16], [Engine.ONNXRUNTIME], installed=CPU)
    options = replace(FEW, forms=(first, replace(second, make=fails)))
    with pytest.raises(EngineError, match="the second form broke"):
        repository_from_checkpoint(CHECKPOINTS / "capivara", tmp_path, name="m", options=options)
    manifest = Manifest.read(tmp_path / "m")
    assert list(manifest.variants) == ["fp32"]
    assert manifest.front_ends


@pytest.mark.parametrize("beside", [True, False])
def test_weights_beside_the_fp32_graphs_reach_every_variant(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32 always has a file of weights here; a lower precision, which needs less, has one or not."""
    monkeypatch.setattr("export.onnx_graph.EXTERNAL_DATA_OVER_BYTES", 0)
    monkeypatch.setattr("export.graphs.files.EXTERNAL_DATA_OVER_BYTES", 0 if beside else 1 << 30)
    forms = forms_for([Precision.FP32, Precision.INT8], [Engine.ONNXRUNTIME], installed=CPU)
    done = repository_from_checkpoint(
        CHECKPOINTS / "capivara", tmp_path, name="m", options=replace(FEW, forms=forms)
    )
    files = {
        key: {
            path.name
            for path in map(Path, (f.path for f in variant.text.files))
            if path.parent.name != "warmup"
        }
        for key, variant in done.manifest.variants.items()
    }
    common = {"config.pbtxt", "tokenizer.json", "model.onnx", "opening.npz"}
    assert files["fp32"] == {*common, "m_text_tower_fp32.data"}
    own = {"m_text_tower_int8_onnxruntime.data"} if beside else set()
    assert files["int8_onnxruntime"] == {*common, *own}


def test_several_precisions_of_weights_that_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("export.onnx_graph", "export.graphs.files"):
        monkeypatch.setattr(f"{module}.EXTERNAL_DATA_OVER_BYTES", 1 << 20)
    precisions = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)
    forms, _ = possible_forms(forms_for(precisions, CPU, installed=CPU))
    options = replace(FEW, forms=forms)
    done = repository_from_checkpoint(CHECKPOINTS / "capivara", tmp_path, name="capivara", options=options)
    assert list(tmp_path.glob("capivara_text_tower_fp32/1/*.data"))
    vectors = {}
    for key, variant in done.manifest.variants.items():
        for engine in variant.engines:
            with Encoder.open(
                tmp_path / "capivara", engine=engine, precision=variant.precision, threads=1
            ) as encoder:
                vectors[key, engine] = encoder.embed_texts(["um gato", "duas casas"])
    reference = vectors["fp32", "onnxruntime"]
    assert len(vectors) >= 4
    for found in vectors.values():
        assert (found * reference).sum(axis=1).min() > 0.98
