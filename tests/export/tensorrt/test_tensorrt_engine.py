"""TensorRT plans: real ahead-of-time builds with TensorRT-RTX on a CPU, and what needs no library.

What is built here is never executed: it shows which kernels the compiler makes of our graphs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_models import TOWERS, batches_of, graph_of, tower_id
from sample_models import Exported
from tensorrt_double import RunningTensorRt, install

from export.tensorrt.engine import engine_from_onnx
from export.tensorrt.kernels import Kernel, expected_types, kernels_from_log, summary_from_kernels
from export.tensorrt.options import FEW_ROWS, SHORT_TEXT, EngineOptions, default_profiles
from export.tensorrt.variant import tensorrt_graph
from runtime.backends.padding import buckets_of_profile
from runtime.backends.plan_checks import profile_for
from runtime.backends.plans import (
    AHEAD_OF_TIME,
    VERSION_COMPATIBLE,
    Compiler,
    Extent,
    PlanManifest,
    Portability,
    Profile,
)
from runtime.errors import EngineError, ExportError
from runtime.manifest import Modality, Precision
from runtime.preprocessing.buckets import text_buckets

ADA = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="8.9")
WIDE = {
    Modality.TEXT: Profile({"batch": Extent(1, 8, 32), "sequence": Extent(1, 16, 77)}),
    Modality.IMAGE: Profile({"batch": Extent(1, 8, 32)}),
}
MULTIPLIES_IN = {
    "fp32": {"Float"},
    "fp16": {"Half"},
    "bf16": {"BFloat16"},
    "int8": {"Int8"},
    "fp8": {"FP8", "Half"},
}
"""Precision → the types that its products have. The patch embedding stays Half beside FP8, and so do the
attentions that no kernel fuses in FP8: those of text towers, whose length is dynamic, and pooling."""
Graphs = Callable[[str, Modality, str], Path]


@pytest.fixture(scope="session")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the compiler that needs no GPU")


@pytest.fixture(scope="session")
def graphs(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Sample, modality and precision → graph for TensorRT."""
    folder = tmp_path_factory.mktemp("tensorrt")

    @cache
    def graph(name: str, modality: Modality, precision: str) -> Path:
        source, target = (
            graph_of(exported(name), modality),
            folder / f"{name}_{modality.value}_{precision}.onnx",
        )
        batches = batches_of(exported(name), modality)[-1:]
        if precision != "fp32":
            tensorrt_graph(Precision(precision), source, target, data_name="w", batches=batches, threads=1)
        return source if precision == "fp32" else target

    return graph


def n_layers(graph: Path) -> int:
    """Self-attentions; SigLIP's pooling, one query over all patches, is none."""
    softmaxes = [node for node in onnx_ir.load(graph).graph if node.op_type == "Softmax"]
    return sum(node.outputs[0].shape[-2] != 1 for node in softmaxes)


def n_pools(graph: Path) -> int:
    """Attentions with one query; between quantized products, TensorRT runs them as two products."""
    return sum(node.op_type == "Softmax" for node in onnx_ir.load(graph).graph) - n_layers(graph)


def require_kernels(graph: Path, modality: Modality, precision: str, capability: str, folder: Path) -> None:
    """Build for a generation: every product of its type, every attention one kernel."""
    options = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability=capability)
    manifest = engine_from_onnx(graph, folder / "model.plan", profiles=[WIDE[modality]], options=options)
    expected = list(expected_types(onnx_ir.load(graph)).values())
    assert (manifest.compute_capability, manifest.precision) == (capability, precision)
    assert manifest.kernels.unseen == ()
    assert manifest.kernels.products == {dtype: expected.count(dtype) for dtype in set(expected)}
    assert set(manifest.kernels.products) == MULTIPLIES_IN[precision]
    if precision != "fp32":
        pools = 0 if precision == "int8" else n_pools(graph)
        assert manifest.kernels.n_fused_attention == n_layers(graph) + pools > 0


@pytest.mark.parametrize("precision", MULTIPLIES_IN)
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_every_product_is_of_its_type_and_every_attention_is_one_kernel(
    name: str, modality: Modality, precision: str, graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    require_kernels(graphs(name, modality, precision), modality, precision, "8.9", tmp_path)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "12.0"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("modality", Modality)
def test_other_generations_build_too(
    modality: Modality, precision: str, capability: str, graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    require_kernels(graphs("capivara", modality, precision), modality, precision, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.0", "8.6"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_every_tower_builds_for_every_generation(
    name: str, modality: Modality, precision: str, capability: str, graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    require_kernels(graphs(name, modality, precision), modality, precision, capability, tmp_path)


def test_the_manifest_lies_beside_the_plan_and_says_what_was_built(
    graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    graph, plan = graphs("nllb-clip", Modality.TEXT, "fp16"), tmp_path / "out" / "model.plan"
    profiles = default_profiles(("batch", "sequence"), max_batch=64, context_length=77)
    manifest = engine_from_onnx(graph, plan, profiles=profiles, options=ADA)
    assert PlanManifest.read(plan) == manifest
    assert manifest.profiles == profiles
    assert manifest.compiler == "tensorrt-rtx"
    assert manifest.compiler_version == rtx.__version__
    assert manifest.note == AHEAD_OF_TIME
    assert (plan.parent / manifest.onnx).read_bytes() == graph.read_bytes()
    assert manifest.inputs["input_ids"].dims == ("batch", "sequence")
    assert manifest.precision == "fp16"
    assert (
        json.loads((plan.parent / "model.plan.json").read_text())["profiles"][0]["dims"]["batch"]["most"] == 1
    )


def test_weights_beside_the_graph_come_along(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    source = graphs("capivara", Modality.TEXT, "fp16")
    model = onnx_ir.load(source)
    onnx_ir.save(model, tmp_path / "model.onnx", external_data="weights.data", size_threshold_bytes=1024)
    plan = tmp_path / "plans" / "model.plan"
    engine_from_onnx(tmp_path / "model.onnx", plan, profiles=[WIDE[Modality.TEXT]], options=ADA)
    assert sorted(path.name for path in plan.parent.iterdir()) == [
        "model.onnx",
        "model.plan",
        "model.plan.json",
        "weights.data",
    ]


def test_a_build_keeps_its_limits(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    options = EngineOptions(
        compiler=Compiler.TENSORRT_RTX,
        compute_capability="8.9",
        workspace_bytes=1 << 30,
        weight_streaming=True,
    )
    graph = graphs("altclip", Modality.TEXT, "fp16")
    manifest = engine_from_onnx(
        graph, tmp_path / "model.plan", profiles=[WIDE[Modality.TEXT]], options=options
    )
    assert manifest.kernels.unseen == ()


def test_fp8_needs_ada(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    ampere = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="8.6")
    graph = graphs("capivara", Modality.IMAGE, "fp8")
    with pytest.raises(ExportError, match=r"FP8, which compute capability 8\.6 does not support"):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[Modality.IMAGE]], options=ampere)


def test_bf16_needs_ampere(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    turing = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="7.5")
    graph = graphs("capivara", Modality.IMAGE, "bf16")
    with pytest.raises(ExportError, match=r"BF16, which compute capability 7\.5 does not support"):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[Modality.IMAGE]], options=turing)


def test_a_generation_that_the_compiler_does_not_know_is_named(
    graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    hopper = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="9.0")
    graph = graphs("capivara", Modality.IMAGE, "fp16")
    with pytest.raises(ExportError, match=r"capability 9\.0; it supports \['SM120', .*'SM89'\]"):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[Modality.IMAGE]], options=hopper)


def small_graph(path: Path, op: str = "MatMul", dtype: int = TensorProto.FLOAT) -> Path:
    weight = numpy_helper.from_array(onnx.helper.np.eye(4, dtype="float32"), "weight")
    x, y = (helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in "xy")
    node = helper.make_node(op, ["x", "weight"] if op == "MatMul" else ["x"], ["y"], name=f"up/{op}")
    graph = helper.make_graph([node], "small", [x], [y], [weight] if op == "MatMul" else [])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_operator_that_the_compiler_lacks_is_named(rtx: Any, tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "model.onnx", op="Det")
    model = onnx.load(graph)
    model.graph.node[0].op_type = "StringNormalizer"
    onnx.save(model, graph)
    profile = Profile({"batch": Extent(1, 1, 2)})
    with pytest.raises(ExportError, match=r"cannot parse .*node 'up/Det' \(StringNormalizer\)"):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[profile], options=ADA)
    assert not (tmp_path / "model.plan").exists()


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], r"No profile was given; .* \['batch'\]"),
        (
            [WIDE[Modality.TEXT]],
            r"names \['batch', 'sequence'\]; the graph's dynamic dimensions are \['batch'\]",
        ),
    ],
)
def test_profiles_that_do_not_fit_the_graph_are_refused(
    profiles: list[Profile], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        engine_from_onnx(
            small_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=profiles, options=ADA
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compiler": Compiler.TENSORRT_RTX}, "needs compute_capability"),
        ({"compute_capability": "8.9"}, "builds for the installed GPU"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        ({"optimization_level": 6}, "optimization_level is 6; expected 0 to 5"),
        (
            {"compiler": Compiler.TENSORRT_RTX, "compute_capability": "8.9", "version_compatible": True},
            "cannot build a version-compatible plan",
        ),
        (
            {"compiler": Compiler.TENSORRT_RTX, "compute_capability": "8.9", "timing_cache": Path("t")},
            "does not use kernel timings",
        ),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        EngineOptions(**options)


def test_default_profiles_cover_every_request_up_to_the_largest() -> None:
    text = default_profiles(("batch", "sequence"), max_batch=64, context_length=77)
    assert len(text) == 5
    for batch in (1, 2, FEW_ROWS, FEW_ROWS + 1, 64):
        for sequence in (1, SHORT_TEXT, SHORT_TEXT + 1, 77):
            assert any(profile.admits({"batch": batch, "sequence": sequence}) for profile in text)
    assert [profile.largest for profile in default_profiles(("batch",), max_batch=32)] == [
        {"batch": 1},
        {"batch": 8},
        {"batch": 32},
    ]
    (short,) = default_profiles(("batch", "sequence"), max_batch=1, context_length=8)
    assert short.capacity == 8
    assert len(default_profiles(("batch", "sequence"), max_batch=64, context_length=16)) == 3


@pytest.mark.parametrize(("max_batch", "context_length"), [(1, 8), (6, 33), (64, 77), (512, 512)])
def test_kernels_are_tuned_for_shapes_that_are_run(max_batch: int, context_length: int) -> None:
    profiles = default_profiles(("batch", "sequence"), max_batch=max_batch, context_length=context_length)
    buckets = text_buckets(context_length, max_rows=max_batch, max_tokens=max_batch * context_length)
    for profile in profiles:
        usual = (profile.dims["batch"].usual, profile.dims["sequence"].usual)
        assert usual in buckets.shapes
        assert usual in buckets_of_profile(profile).shapes
    for rows, length in buckets.shapes:
        profile = profiles[profile_for(profiles, {"batch": rows, "sequence": length})]
        assert (rows, length) in buckets_of_profile(profile).shapes


def half_graph(path: Path) -> Path:
    model = onnx.load(small_graph(path, dtype=TensorProto.FLOAT16))
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype("float16")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    onnx.save(model, path)
    return path


LISTING = """Layers:
Name: up/MatMul_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,4], Datatype: %s }], \
Constants: [ { Name: w, Dimensions: [4,4], Datatype: Half }, { Name: alpha, Datatype: Float }], \
Outputs: [ { Name: y, Datatype: Half }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: up/MatMul]
Name: moved, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float }], Constants: [], \
Outputs: [], TacticName: , StreamId: 0, EventId: 3, Metadata: [ONNX Layer: up/MatMul][ONNX Layer: a/Cast]
"""


def test_a_cast_behind_a_dequantized_tensor_does_not_hide_its_type(tmp_path: Path) -> None:
    """Scales under FP16's smallest number stay FP32, with a cast to FP16 behind them."""
    fp32, fp16, int8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "tiny"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["left"], to=fp16),
        helper.make_node("DequantizeLinear", ["others", "half"], ["right"]),
        helper.make_node("MatMul", ["left", "right"], ["scores"], name="scores"),
        helper.make_node("Cast", ["floats"], ["cast"], to=fp16),
        helper.make_node("MatMul", ["cast", "scores"], ["y"], name="plain"),
    ]
    codes = [helper.make_tensor_value_info(name, int8, [4, 4]) for name in ("codes", "others")]
    inputs = [*codes, helper.make_tensor_value_info("floats", fp32, [4, 4])]
    scales = [helper.make_tensor("tiny", fp32, [], [1e-6]), helper.make_tensor("half", fp16, [], [1.0])]
    value_info = [
        helper.make_tensor_value_info(name, dtype, [4, 4])
        for name, dtype in (("wide", fp32), ("left", fp16), ("right", fp16), ("scores", fp16), ("cast", fp16))
    ]
    outputs = [helper.make_tensor_value_info("y", fp16, [4, 4])]
    graph = helper.make_graph(nodes, "casts", inputs, outputs, scales, value_info=value_info)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    assert expected_types(onnx_ir.load(tmp_path / "m.onnx")) == {"scores": "Int8", "plain": "Half"}


def test_the_listing_is_read_and_held_to_the_graph(tmp_path: Path) -> None:
    model = onnx_ir.load(small_graph(tmp_path / "m.onnx", dtype=TensorProto.FLOAT16))
    model.graph.initializers["weight"].dtype = onnx_ir.DataType.FLOAT16
    gemm, moved = kernels_from_log(["something else", LISTING % "Half"])
    assert gemm == Kernel("up/MatMul_myl0_1", "gemm", ("Half",), ("Half",), ("up/MatMul",), "t")
    assert (moved.multiplies, moved.nodes) == (False, ("up/MatMul", "a/Cast"))
    assert summary_from_kernels(model, [gemm, moved]).products == {"Half": 1}
    with pytest.raises(ExportError, match="precision cannot be checked"):
        summary_from_kernels(model, [moved])
    wrong = kernels_from_log([LISTING % "Float"])
    with pytest.raises(ExportError, match=r"'up/MatMul' should compute in Half, .* did not keep"):
        summary_from_kernels(model, wrong)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RunningTensorRt:
    return install(monkeypatch)


FEW = Profile({"batch": Extent(1, 2, 3)})


@pytest.mark.parametrize(("version", "flags"), [("10.9.0.34", 2), ("10.16.1", 2), ("11.4.0", 0)])
def test_networks_are_strongly_typed_in_every_release(
    version: str, flags: int, library: RunningTensorRt, tmp_path: Path
) -> None:
    library.__version__ = version
    options = EngineOptions(
        portability=Portability.AMPERE_PLUS,
        version_compatible=True,
        workspace_bytes=5,
        optimization_level=2,
        weight_streaming=True,
    )
    manifest = engine_from_onnx(
        small_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[FEW], options=options
    )
    assert ("network", flags) in library.asked
    assert ("clear", "tf32") in library.asked
    assert ("set", "tf32") not in library.asked
    assert {("set", "vc"), ("set", "ws"), ("workspace", 5)} <= set(library.asked)
    assert library.profiles == [{"x": ((1, 4), (2, 4), (3, 4))}]
    assert library.config.hardware_compatibility_level == "ampere"
    assert library.config.builder_optimization_level == 2
    assert manifest.options["optimization_level"] == 2
    assert manifest.runs_on == f"TensorRT {version} and later releases of {version[:2]}.x"
    assert manifest.serve_with == VERSION_COMPATIBLE
    assert (manifest.gpu, manifest.compute_capability, manifest.note) == ("NVIDIA L4", "8.9", "")
    assert (manifest.kernels.products, manifest.kernels.unseen) == ({"Float": 1}, ())


@pytest.mark.parametrize("listed", ["Float", "Row major linear FP32 format"])
def test_fp32_built_for_fp16_is_an_error(listed: str, library: RunningTensorRt, tmp_path: Path) -> None:
    graph = half_graph(tmp_path / "m.onnx")
    assert engine_from_onnx(graph, tmp_path / "m.plan", profiles=[FEW]).kernels.products == {"Half": 1}
    (tmp_path / "m.plan").unlink()
    library.listed = listed
    with pytest.raises(
        ExportError, match=r"'up/MatMul' should compute in Half, .*did not keep the graph's precision"
    ):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[FEW])
    assert not (tmp_path / "m.plan").exists()


def test_a_listing_that_shows_nothing_is_an_error(library: RunningTensorRt, tmp_path: Path) -> None:
    library.lists_nodes = False
    with pytest.raises(ExportError, match="precision cannot be checked"):
        engine_from_onnx(half_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[FEW])


def test_a_plan_without_an_inspector_is_an_error(library: RunningTensorRt, tmp_path: Path) -> None:
    library.has_inspector = False
    with pytest.raises(ExportError, match="cannot list the kernels of the plan"):
        engine_from_onnx(half_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[FEW])
    assert not (tmp_path / "m.plan").exists()


def test_a_profile_that_the_library_refuses_is_named(library: RunningTensorRt, tmp_path: Path) -> None:
    library.refuses_profiles = True
    with pytest.raises(ExportError, match=r"rejects profile \(batch 1–3\): profile 0 is not valid"):
        engine_from_onnx(small_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[FEW])


def test_timings_are_kept_and_those_of_another_gpu_refused(library: RunningTensorRt, tmp_path: Path) -> None:
    graph, cache = small_graph(tmp_path / "m.onnx"), tmp_path / "timings" / "cache.bin"
    options = EngineOptions(timing_cache=cache)
    engine_from_onnx(graph, tmp_path / "m.plan", profiles=[FEW], options=options)
    assert cache.read_bytes() == b"t"
    cache.write_bytes(b"other")
    with pytest.raises(ExportError, match=r"cache\.bin belongs to another TensorRT release or GPU"):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[FEW], options=options)


def test_a_build_that_fails_says_why(library: RunningTensorRt, tmp_path: Path) -> None:
    library.fails_to_build, profile = True, FEW
    graph = small_graph(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"could not build .*: no reason was logged"):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[profile])
    library.__version__ = "8.6.1"
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 is not supported"):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[profile])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(), r"needs tensorrt, which is not installed.*babeltower\[tensorrt\]"),
        (ADA, r"needs tensorrt_rtx, which is not installed.*tensorrt-rtx-cu12"),
    ],
)
def test_a_missing_compiler_is_an_error_and_never_another_one(
    options: EngineOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    profile = Profile({"batch": Extent(1, 2, 3)})
    with pytest.raises(EngineError, match=message):
        engine_from_onnx(
            small_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[profile], options=options
        )
