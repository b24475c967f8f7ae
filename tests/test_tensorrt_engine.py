"""TensorRT plans: real ahead-of-time builds with TensorRT-RTX on a CPU, and what needs no library.

What is built here is never executed: it shows which kernels the compiler makes of our graphs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_models import TOWERS, batches_of, graph_of, tower_id
from sample_models import Exported

from export.activation_ranges import activation_ranges
from export.fp8 import fp8_from_onnx
from export.fp16 import fp16_from_onnx
from export.int8 import Target, int8_from_onnx, recipe_for
from export.tensorrt_engine import engine_from_onnx
from export.tensorrt_kernels import Kernel, expected_types, kernels_from_log, summary_from_kernels
from export.tensorrt_options import SHORT_TEXT, EngineOptions, default_profiles
from runtime.errors import EngineError, ExportError
from runtime.manifest import Modality
from runtime.plans import AHEAD_OF_TIME, Compiler, DeviceFacts, Extent, PlanManifest, Portability, Profile

ADA = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="8.9")
WIDE = {
    Modality.TEXT: Profile({"batch": Extent(1, 8, 32), "sequence": Extent(1, 16, 77)}),
    Modality.IMAGE: Profile({"batch": Extent(1, 8, 32)}),
}
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
        if precision == "fp32":
            return source
        if precision == "int8":
            recipe, quantised = recipe_for(Target.TENSORRT), target.with_suffix(".q.onnx")
            int8_from_onnx(source, quantised, data_name="q", calibration=batches, recipe=recipe)
            source = quantised
        ranges = activation_ranges(source, batches, threads=1)
        convert = fp8_from_onnx if precision == "fp8" else fp16_from_onnx
        convert(source, target, data_name="w", ranges=ranges)
        return target

    return graph


def n_layers(graph: Path) -> int:
    """Self-attentions; SigLIP's pooling, one query over all patches, is none."""
    softmaxes = [node for node in onnx_ir.load(graph).graph if node.op_type == "Softmax"]
    return sum(node.outputs[0].shape[-2] != 1 for node in softmaxes)


def n_pools(graph: Path) -> int:
    """Attentions with one query; between quantised products, TensorRT runs them as two products."""
    return sum(node.op_type == "Softmax" for node in onnx_ir.load(graph).graph) - n_layers(graph)


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_every_product_is_of_its_type_and_every_attention_is_one_kernel(
    name: str, modality: Modality, precision: str, graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    graph = graphs(name, modality, precision)
    manifest = engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[modality]], options=ADA)
    expected = list(expected_types(onnx_ir.load(graph)).values())
    assert manifest.kernels.unseen == ()
    assert manifest.kernels.products == {dtype: expected.count(dtype) for dtype in set(expected)}
    pools = 0 if precision == "int8" else n_pools(graph)
    assert manifest.kernels.n_fused_attention == n_layers(graph) + pools > 0
    allowed = {"fp16": {"Half"}, "int8": {"Int8"}, "fp8": {"FP8", "Half"}}
    assert set(manifest.kernels.products) == allowed[precision]


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_fp32_stays_fp32(name: str, modality: Modality, graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    graph = graphs(name, modality, "fp32")
    manifest = engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[modality]], options=ADA)
    assert set(manifest.kernels.products) == {"Float"}
    assert manifest.kernels.unseen == ()


@pytest.mark.parametrize("capability", ["8.0", "8.6", "12.0"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("modality", Modality)
def test_other_generations_build_too(
    modality: Modality, precision: str, capability: str, graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    options = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability=capability)
    graph = graphs("capivara", modality, precision)
    manifest = engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[modality]], options=options)
    assert manifest.kernels.n_fused_attention == n_layers(graph)
    assert manifest.compute_capability == capability


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


def test_a_build_keeps_its_limits_and_timings(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    options = EngineOptions(
        compiler=Compiler.TENSORRT_RTX,
        compute_capability="8.9",
        workspace_bytes=1 << 30,
        weight_streaming=True,
        timing_cache=tmp_path / "timings" / "cache.bin",
    )
    graph = graphs("altclip", Modality.TEXT, "fp16")
    for _ in range(2):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[Modality.TEXT]], options=options)
        assert (tmp_path / "timings" / "cache.bin").is_file()


def test_fp8_needs_ada(graphs: Graphs, rtx: Any, tmp_path: Path) -> None:
    ampere = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="8.6")
    graph = graphs("capivara", Modality.IMAGE, "fp8")
    with pytest.raises(ExportError, match=r"FP8, which compute capability 8\.6 cannot"):
        engine_from_onnx(graph, tmp_path / "model.plan", profiles=[WIDE[Modality.IMAGE]], options=ampere)


def test_a_generation_that_the_compiler_does_not_know_is_named(
    graphs: Graphs, rtx: Any, tmp_path: Path
) -> None:
    hopper = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="9.0")
    graph = graphs("capivara", Modality.IMAGE, "fp16")
    with pytest.raises(ExportError, match=r"capability 9\.0; it knows \['SM120', .*'SM89'\]"):
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
    with pytest.raises(ExportError, match=r"cannot read .*node 'up/Det' \(StringNormalizer\)"):
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
        ({"compute_capability": "8.9"}, "builds for the GPU that is here"),
        ({"workspace_bytes": 0}, "workspace of 0 bytes"),
        (
            {"compiler": Compiler.TENSORRT_RTX, "compute_capability": "8.9", "version_compatible": True},
            "no version-compatible plan",
        ),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        EngineOptions(**options)


def test_default_profiles_cover_every_request_up_to_the_largest() -> None:
    text = default_profiles(("batch", "sequence"), max_batch=64, context_length=77)
    for batch in (1, 2, 64):
        for sequence in (1, SHORT_TEXT, SHORT_TEXT + 1, 77):
            assert any(profile.admits({"batch": batch, "sequence": sequence}) for profile in text)
    assert [profile.largest for profile in default_profiles(("batch",), max_batch=32)] == [
        {"batch": 1},
        {"batch": 32},
    ]
    short = default_profiles(("batch", "sequence"), max_batch=1, context_length=8)
    assert {profile.capacity for profile in short} == {8}


LISTING = """Layers:
Name: up/MatMul_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,4], Datatype: %s }], \
Constants: [ { Name: w, Dimensions: [4,4], Datatype: Half }, { Name: alpha, Datatype: Float }], \
Outputs: [ { Name: y, Datatype: Half }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: up/MatMul]
Name: moved, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float }], Constants: [], \
Outputs: [], TacticName: , StreamId: 0, EventId: 3, Metadata: [ONNX Layer: up/MatMul][ONNX Layer: a/Cast]
"""


def test_the_listing_is_read_and_held_to_the_graph(tmp_path: Path) -> None:
    model = onnx_ir.load(small_graph(tmp_path / "m.onnx", dtype=TensorProto.FLOAT16))
    model.graph.initializers["weight"].dtype = onnx_ir.DataType.FLOAT16
    gemm, moved = kernels_from_log(["something else", LISTING % "Half"])
    assert gemm == Kernel("up/MatMul_myl0_1", "gemm", ("Half",), ("Half",), ("up/MatMul",))
    assert (moved.multiplies, moved.nodes) == (False, ("up/MatMul", "a/Cast"))
    assert summary_from_kernels(model, [gemm, moved]).products == {"Half": 1}
    assert summary_from_kernels(model, [moved]).unseen == ("up/MatMul",)
    wrong = kernels_from_log([LISTING % "Float"])
    with pytest.raises(ExportError, match=r"'up/MatMul' was to compute in Half, .* did not honour"):
        summary_from_kernels(model, wrong)


class FakeBuilder(ModuleType):
    """The part of TensorRT that building uses, and a record of what was asked of it."""

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="vc", WEIGHT_STREAMING="ws")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere", SAME_COMPUTE_CAPABILITY="same")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal"

        def __init__(self) -> None:
            pass

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.asked: list[Any] = []
        self.built: bytes | None = b"plan"

    def Builder(self, log: Any) -> Any:  # noqa: N802 - the library's name
        self.log = log
        config = SimpleNamespace(
            set_flag=lambda flag: self.asked.append(("set", flag)),
            clear_flag=lambda flag: self.asked.append(("clear", flag)),
            set_memory_pool_limit=lambda pool, size: self.asked.append((pool, size)),
            add_optimization_profile=lambda profile: self.asked.append("profile"),
        )
        self.config = config
        shapes = SimpleNamespace(set_shape=lambda *shape: self.asked.append(shape))
        return SimpleNamespace(
            create_network=lambda flags: self.asked.append(("network", flags)),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: shapes,
            build_serialized_network=lambda network, config: self.built,
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802 - the library's name
        return SimpleNamespace(parse_from_file=lambda path: True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(facts=DeviceFacts("NVIDIA L4", "8.9", "13.0"), close=lambda: None)
    monkeypatch.setattr("export.tensorrt_engine.open_device", lambda: device)


@pytest.mark.parametrize(("version", "flags"), [("10.9.0.34", 2), ("10.16.1", 2), ("11.4.0", 0)])
def test_networks_are_strongly_typed_in_every_release(
    version: str, flags: int, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeBuilder(version)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    options = EngineOptions(
        portability=Portability.AMPERE_PLUS, version_compatible=True, workspace_bytes=5, weight_streaming=True
    )
    profile = Profile({"batch": Extent(1, 2, 3)})
    manifest = engine_from_onnx(
        small_graph(tmp_path / "m.onnx"), tmp_path / "m.plan", profiles=[profile], options=options
    )
    assert ("network", flags) in library.asked
    assert ("clear", "tf32") in library.asked
    assert ("set", "tf32") not in library.asked
    assert {("set", "vc"), ("set", "ws"), ("workspace", 5)} <= set(library.asked)
    assert ("x", (1, 4), (2, 4), (3, 4)) in library.asked
    assert library.config.hardware_compatibility_level == "ampere"
    assert (manifest.gpu, manifest.compute_capability, manifest.note) == ("NVIDIA L4", "8.9", "")
    assert manifest.kernels.unseen == ("up/MatMul",)


def test_a_build_that_fails_says_why(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeBuilder("11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    library.built, profile = None, Profile({"batch": Extent(1, 2, 3)})
    graph = small_graph(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"could not build .*: no reason was logged"):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[profile])
    library.__version__ = "8.6.1"
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 is not supported"):
        engine_from_onnx(graph, tmp_path / "m.plan", profiles=[profile])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(), r"tensorrt is not installed .*babeltower\[tensorrt\]"),
        (ADA, r"tensorrt-rtx is not installed .*tensorrt-rtx-cu12"),
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
