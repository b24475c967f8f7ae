"""Sensitivity: the product that suffers is found, no more than needed is kept, what came of it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model, shape_inference
from sample_models import CHECKPOINTS
from small_exports import few_drawings
from typer.testing import CliRunner

from export.onnx_graph import IR_VERSION, OPSET
from export.precision.calibration import CalibrationSet, CalibrationSize
from export.precision.clipping import ClipMethod
from export.precision.int8 import Int8Recipe
from export.sensitivity.costs import Product, costs_of_products, expected_turns, probe_from_graphs
from export.sensitivity.quantize import (
    QuantizeOptions,
    accepted_trial,
    quantized_from_checkpoint,
    recipe_from_options,
)
from export.sensitivity.report import SensitivityReport
from export.sensitivity.trials import Trial, fewest_kept
from runtime.commands.app import app
from runtime.errors import ExportError, ParityError
from runtime.manifest import Engine, Manifest, Modality

N_LAYERS, WIDTH = 5, 24


def chain_of_layers(path: Path, *, outlier_before: int | None) -> Path:
    """Linear layers and ReLUs; a channel before one of them is huge, and that layer ignores it."""
    random = np.random.default_rng(7)
    nodes, weights, value = [], [], "x"
    for i in range(N_LAYERS):
        weight = random.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        if outlier_before == i:
            weight[0] = 0
        if outlier_before == i + 1:
            weight[:, 0] = 400 * np.abs(weight[:, 0])
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"p{i}"], f"layer{i}/MatMul"))
        value = f"p{i}"
        if i < N_LAYERS - 1:
            nodes.append(helper.make_node("Relu", [value], [f"r{i}"], f"layer{i}/Relu"))
            value = f"r{i}"
    nodes.append(helper.make_node("LpNormalization", [value], ["vector"], "norm", axis=-1))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    save_model(shape_inference.infer_shapes(model), path)
    return path


@pytest.mark.parametrize("planted", [1, 3, 4])
def test_a_planted_outlier_layer_costs_most(planted: int, tmp_path: Path) -> None:
    random = np.random.default_rng(1)

    def batches() -> list[dict[str, np.ndarray]]:
        return [{"x": np.abs(random.standard_normal((32, WIDTH))).astype(np.float32)} for _ in range(4)]

    inputs = CalibrationSet("a test", 0, {}, batches(), batches())
    sources = {
        Modality.TEXT: chain_of_layers(tmp_path / "text.onnx", outlier_before=planted),
        Modality.IMAGE: chain_of_layers(tmp_path / "image.onnx", outlier_before=None),
    }
    probe = probe_from_graphs(sources, inputs)
    costs = costs_of_products(
        sources[Modality.TEXT],
        Modality.TEXT,
        probe=probe,
        calibration=batches(),
        recipe=Int8Recipe(method=ClipMethod.MIN_MAX),
    )
    assert [cost.product.name for cost in costs] == [f"layer{i}/MatMul" for i in range(N_LAYERS)]
    assert sum(cost.share for cost in costs) == pytest.approx(1)
    ordered = sorted(costs, key=lambda cost: -cost.turned)
    assert ordered[0].product == Product(Modality.TEXT, f"layer{planted}/MatMul")
    assert ordered[0].turned > 2 * ordered[1].turned
    assert ordered[0].cosine == min(cost.cosine for cost in costs)


def test_expected_turns_follow_the_noise() -> None:
    random = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    queries, items = unit(random.standard_normal((2_000, 32))), unit(random.standard_normal((300, 32)))
    assert expected_turns((queries, queries), (items, items)) == 0
    found = []
    for size in (0.01, 0.05, 0.2):
        noisy = unit(queries + size * random.standard_normal(queries.shape) / math.sqrt(32))
        turned = np.mean((queries @ items.T).argmax(1) != (noisy @ items.T).argmax(1))
        found.append(expected_turns((queries, noisy), (items, items)))
        assert found[-1] == pytest.approx(turned, rel=0.5, abs=0.004)
    assert found == sorted(found)


def products(n: int) -> list[Product]:
    return [Product(Modality.TEXT, f"{i:02}") for i in range(n)]


def trial_where(broken: set[int], calls: list[int]):
    """Passes when all the broken products are kept."""

    def trial(kept: Sequence[Product]) -> Trial:
        calls.append(len(kept))
        missing = broken - {int(product.name) for product in kept}
        return Trial(tuple(kept), 1.0, 0.0, 0.0, "por_Latn", 1.0, ("broken",) if missing else ())

    return trial


@pytest.mark.parametrize("broken", [set(), {0}, {2}, {0, 3}, {1, 5, 6}, {30}, set(range(8))], ids=str)
def test_no_more_than_needed_is_kept(broken: set[int]) -> None:
    calls: list[int] = []
    found = fewest_kept(products(31), trial_where(broken, calls))
    assert found is not None
    n_unneeded = len(found.kept) - len(broken)
    assert {int(product.name) for product in found.kept} >= broken
    assert n_unneeded <= max(0, max(broken, default=0) - 8)
    assert len(calls) <= 25


def test_nothing_is_chosen_where_nothing_will_do() -> None:
    assert fewest_kept(products(5), trial_where({99}, [])) is None


LEAN = {"n_texts": 160, "n_images": 24}


def lean(monkeypatch: pytest.MonkeyPatch, engine: Engine, **options: object) -> QuantizeOptions:
    monkeypatch.setattr("export.sensitivity.quantize._PROBE", CalibrationSize(**LEAN))
    return QuantizeOptions(
        engine=engine,
        captions_per_language=24,
        retrieval_set=few_drawings(),
        threads=1,
        **options,
    )


def test_a_sample_is_quantized_through_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One product is made to look expensive: what is chosen must reach the graph, the manifest and the files.
    costly = "encoder.blocks.0.down/MatMul"

    def fewest(ranked: Sequence[Product], trial):
        assert len(ranked) > 30
        assert not trial(()).failures
        return trial([Product(Modality.TEXT, costly)])

    monkeypatch.setattr("export.sensitivity.quantize.fewest_kept", fewest)
    # Of a dozen drawings, one query is eight points: the true limit would judge chance.
    limits = {"calibration_size": CalibrationSize(300, 40, seed=3), "max_recall_drop": 0.02}
    options = lean(monkeypatch, Engine.ONNXRUNTIME, **limits)
    done = quantized_from_checkpoint(CHECKPOINTS / "nllb-clip", tmp_path, options, name="m")
    variant = Manifest.read(tmp_path / "m").variants["int8_onnxruntime"]
    assert variant.recipe["text"]["kept_products"] == [costly]
    assert variant.recipe["image"]["kept_products"] == []
    assert variant.calibration["seed"] == 3
    record = json.loads((tmp_path / "m.int8_onnxruntime.sensitivity.json").read_text())
    assert record == json.loads(json.dumps(done.report.as_json()))
    assert record["kept"] == {"text": [costly]}
    assert record["calibration"] == variant.calibration
    assert record["probe"]["sha256"] != record["calibration"]["sha256"]
    turned = [product["expected_turned"] for product in record["products"]]
    assert turned == sorted(turned, reverse=True)
    assert record["trials"][0]["n_kept"] == 0
    assert record["trials"][0]["share_int8"] == 1
    assert record["trials"][-1]["share_int8"] == 0
    assert all(trial["pairs_per_core_second"] > 0 for trial in record["trials"])
    assert [path.suffix for path in done.files] == [".json", ".md", ".svg"]
    assert f"`{costly}`" in done.files[1].read_text()
    assert "</svg>" in done.files[2].read_text()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (None, "no product could be quantized within the limit"),
        (Trial(tuple(products(3)), 0.3, 0.0, 0.0, "por_Latn", 1.0, ()), r"3 of 0 products .* 30\.0%"),
    ],
)
def test_int8_in_name_alone_is_refused_and_the_worst_languages_named(
    chosen: Trial | None, message: str
) -> None:
    broken = tuple(f"{code}, text_to_image: R@1 0.3 → 0.1" for code in ("ibo_Latn", "mal_Mlym", "tam_Taml"))
    whole = Trial((), 1.0, 0.2, 0.3, "ibo_Latn", 1.0, broken)
    report = SensitivityReport("m", "openvino", (), (whole,), chosen, {"max_recall_drop": 0.005})
    options = QuantizeOptions(engine=Engine.OPENVINO)
    with pytest.raises(ParityError, match=rf"m was not published .*{message}.*ibo_Latn.*tam_Taml.*3 limits"):
        accepted_trial(report, options, Path("m.md"))


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not support tensorrt"):
        QuantizeOptions(engine=Engine.TENSORRT)
    with pytest.raises(ExportError, match="is out of range"):
        QuantizeOptions(engine=Engine.OPENVINO, max_recall_drop=0)
    with pytest.raises(ExportError, match="Unknown clipping method 'median'"):
        recipe_from_options(Engine.OPENVINO, method="median", percentile=None, smooth=None)
    with pytest.raises(ExportError, match="no effect with method mse"):
        recipe_from_options(Engine.OPENVINO, method=None, percentile=99.0, smooth=None)
    done = CliRunner().invoke(app, ["quantize", str(tmp_path), str(tmp_path), "--engine", "tensorrt"])
    assert done.exit_code != 0
