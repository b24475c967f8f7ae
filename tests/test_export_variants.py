"""Variants: what may be asked for, what is published, and what the gate refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_models import CHECKPOINTS, NAMES, Exported
from stock_backends import require_accepted
from typer.testing import CliRunner

from export import repository_from_checkpoint
from export.cli import app
from export.clipping import ClipMethod
from export.int8 import Int8Recipe, Target
from export.limits import LIMITS
from export.repository import ExportOptions, installed_engines
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet
from export.variants import FORMS, forms_for
from runtime import Encoder
from runtime.backends import Engine
from runtime.errors import ExportError, ManifestError, ParityError
from runtime.manifest import Manifest, Modality, Precision, manifest_path

CPU = (Engine.ONNXRUNTIME, Engine.OPENVINO)
LOWER = [form for form in FORMS if form.precision is not Precision.FP32 and set(form.opened_by) <= set(CPU)]


def few_drawings() -> RetrievalSet:
    """Every ninth drawing, and its names in every language."""
    whole = sample_retrieval_set()
    new_index = {old: new for new, old in enumerate(range(0, len(whole.images), 9))}
    captions = []
    for entry in whole.captions:
        pairs = zip(entry.texts, entry.image_of, strict=True)
        texts, image_of = zip(*((t, new_index[i]) for t, i in pairs if i in new_index), strict=True)
        captions.append(replace(entry, texts=texts, image_of=image_of))
    return replace(whole, images=whole.images[::9], captions=tuple(captions))


FEW = ExportOptions(texts_per_language=1, captions_per_language=24, retrieval_set=few_drawings(), threads=1)


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Sample name → REPOSITORY/NAME in every precision but FP32, exported at its first use."""
    repository = tmp_path_factory.mktemp("lowered") / "repository"

    def model_of(name: str) -> Path:
        if not manifest_path(repository / name).is_file():
            options = replace(FEW, forms=tuple(LOWER))
            repository_from_checkpoint(CHECKPOINTS / name, repository, name=name, options=options)
        return repository / name

    return model_of


@pytest.mark.parametrize("form", LOWER, ids=lambda form: form.key)
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
        assert require_accepted(model.parent / tower.model).backend == form.opened_by[0].value
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


@pytest.mark.parametrize("form", LOWER, ids=lambda form: form.key)
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
    assert np.abs(alone - batched).max() <= LIMITS[form.precision].max_row_error


@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_equals_the_image_in_a_batch_in_int8(name: str, lowered: Exported) -> None:
    random = np.random.default_rng(3)
    images = [random.integers(0, 256, (60 + 9 * i, 80, 3), dtype=np.uint8) for i in range(7)]
    for engine in CPU:
        with Encoder.open(lowered(name), engine=engine, precision="int8", threads=1) as encoder:
            batched = encoder.embed_images(images)
            alone = np.concatenate([encoder.embed_images([image]) for image in images])
        assert np.abs(alone - batched).max() <= 1e-6


def test_a_precision_opens_on_the_engines_it_was_measured_on_alone(lowered: Exported) -> None:
    model = lowered("capivara")
    with pytest.raises(ManifestError, match=r"bf16 was not measured on onnxruntime.*bf16_openvino"):
        Encoder.open(model, engine="onnxruntime", precision="bf16")
    with pytest.raises(ManifestError, match=r"holds no fp32 variant.*--precision fp32"):
        Encoder.open(model)
    with pytest.raises(ManifestError, match="name the engine too"):
        Manifest.read(model).variant(Precision.INT8)


def test_an_unfit_int8_is_refused_and_the_report_names_the_worst_languages(tmp_path: Path) -> None:
    clipped = Int8Recipe(target=Target.OPENVINO, method=ClipMethod.PERCENTILE, percentile=90)
    options = replace(FEW, forms=forms_for([Precision.INT8], [Engine.OPENVINO], installed=CPU))
    with pytest.raises(
        ParityError, match=r"int8_openvino does not agree .*mean over 106 languages.*R@1 fell most in \w{3}_"
    ):
        repository_from_checkpoint(
            CHECKPOINTS / "capivara",
            tmp_path,
            name="m",
            options=replace(options, recipes=dict.fromkeys(Modality, clipped)),
        )
    record = json.loads((tmp_path / "m.int8_openvino.refused.json").read_text())
    worst = [
        violation for violation in record["violations"] if "_to_" in violation and "mean" not in violation
    ]
    assert len(worst) > 10
    assert "openvino" in record["worst_languages"][0]
    (figures,) = record["retrieval"].values()
    sides = figures["languages"].items()
    drops = {code: entry["text_to_image"] for code, entry in sides}
    first = worst[0].split(": ")[1].split(",")[0]
    assert drops[first]["reference"]["1"] - drops[first]["exported"]["1"] > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.int8_openvino.refused.json"]


def test_one_refused_variant_does_not_keep_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import repository as repository_module

    strict = {**LIMITS, Precision.BF16: replace(LIMITS[Precision.BF16], min_cosine=0.9999999)}
    monkeypatch.setattr(repository_module, "LIMITS", strict)
    forms = forms_for([Precision.BF16, Precision.FP32], [Engine.OPENVINO], installed=CPU)
    with pytest.raises(
        ParityError, match=r"bf16_openvino does not agree.*R@1 fell most in .*Published were fp32"
    ):
        repository_from_checkpoint(
            CHECKPOINTS / "capivara", tmp_path, name="m", options=replace(FEW, forms=forms)
        )
    manifest = Manifest.read(tmp_path / "m")
    assert list(manifest.variants) == ["fp32"]
    manifest.verify(tmp_path, manifest.variants["fp32"])


def test_an_accepted_drop_is_recorded() -> None:
    limits = LIMITS[Precision.INT8].accepting(0.02)
    assert (limits.accepted_drop, limits.retrieval.max_mean_drop) == (0.02, 0.02)
    assert (limits.retrieval.max_recall_drop, limits.retrieval.max_later_recall_drop) == (0.02, 0.02)
    assert LIMITS[Precision.INT8].accepting(0.001).retrieval == LIMITS[Precision.INT8].retrieval


def test_what_cannot_be_made_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"bf16 has no form for \['onnxruntime'\].*openvino"):
        forms_for([Precision.BF16], [Engine.ONNXRUNTIME], installed=CPU)
    with pytest.raises(ExportError, match="openvino is not installed here"):
        forms_for([Precision.INT8], [Engine.OPENVINO], installed=[Engine.ONNXRUNTIME])
    with pytest.raises(ExportError, match="captions_per_language=0 would measure none"):
        ExportOptions(forms=tuple(LOWER), captions_per_language=0)


def test_every_cpu_engine_is_measured_here() -> None:
    assert set(CPU) <= set(installed_engines())
    keys = [form.key for form in forms_for([Precision.INT8, Precision.FP32], [], installed=CPU)]
    assert keys == ["int8_onnxruntime", "int8_openvino", "fp32"]


def test_the_command_publishes_several_precisions(tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / "capivara"), str(tmp_path), "--precision", "int8"]
    arguments += ["--precision", "bf16", "--engine", "openvino", "--captions-per-language", "8", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["parity"]) == {"int8_openvino", "bf16_openvino"}
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    towers = [f"capivara_{m.value}_tower_{v}" for m in Modality for v in ("int8_openvino", "bf16_openvino")]
    assert folders == sorted([*towers, "capivara_text", "capivara_image"])


@pytest.mark.parametrize("beside", [True, False])
def test_weights_beside_the_fp32_graphs_reach_every_variant(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32 always has a file of weights here; a lower precision, which needs less, has one or not."""
    monkeypatch.setattr("export.onnx_graph.EXTERNAL_DATA_OVER_BYTES", 0)
    monkeypatch.setattr("export.graph_files.EXTERNAL_DATA_OVER_BYTES", 0 if beside else 1 << 30)
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
    assert files["fp32"] == {"config.pbtxt", "tokenizer.json", "model.onnx", "m_text_tower_fp32.data"}
    own = {"m_text_tower_int8_onnxruntime.data"} if beside else set()
    assert files["int8_onnxruntime"] == {"config.pbtxt", "tokenizer.json", "model.onnx", *own}


def test_several_precisions_of_weights_that_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("export.onnx_graph", "export.graph_files"):
        monkeypatch.setattr(f"{module}.EXTERNAL_DATA_OVER_BYTES", 1 << 20)
    precisions = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)
    options = replace(FEW, forms=forms_for(precisions, [Engine.OPENVINO, Engine.ONNXRUNTIME], installed=CPU))
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
    assert len(vectors) >= 6
    for found in vectors.values():
        assert (found * reference).sum(axis=1).min() > 0.98
