"""A tower's configuration in each stock backend's words, and how it is operated."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from stock_backends import config_of_folder, require_accepted
from tritonclient.grpc import model_config_pb2

from export.triton.tower_config import (
    TowerSettings,
    operation_of_tower,
    resettle,
    resettled,
    settings_of_config,
    tower_config,
)
from runtime.backends.plans import Extent, KernelSummary, PlanManifest, Profile, TensorSpec
from runtime.errors import EngineError, ExportError, ManifestError
from runtime.manifest import GRAPH_ENGINES, Engine, Modality, Precision
from runtime.preprocessing.buckets import image_buckets, text_buckets
from runtime.storage import sha256_of_file
from runtime.triton_config import engine_of_config_text
from triton_models.tower import TowerServer, tower_config_from_triton

CONTEXT = 24
CPU_FORMS = [
    (Engine.ONNXRUNTIME, Precision.FP32),
    (Engine.ONNXRUNTIME, Precision.FP16),
    (Engine.ONNXRUNTIME, Precision.INT8),
    (Engine.OPENVINO, Precision.FP32),
    (Engine.OPENVINO, Precision.BF16),
    (Engine.OPENVINO, Precision.INT8),
]


GPU_FORMS = [
    (Engine.CUDA, Precision.FP32),
    (Engine.CUDA, Precision.FP16),
    (Engine.CUDA, Precision.BF16),
    (Engine.TENSORRT, Precision.FP16),
]


def tower(
    folder: Path,
    modality: Modality,
    engine: Engine,
    precision: Precision,
    *,
    context: int = CONTEXT,
    **settings: object,
) -> Path:
    """A Triton model around the smallest graph of a tower's shape, with a plan for TensorRT."""
    graph = folder / "1" / "model.onnx"
    graph.parent.mkdir(parents=True)
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    if modality is Modality.TEXT:
        nodes = [
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]),
            helper.make_node("Cast", ["kept"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers", "axes"], ["vector"], keepdims=1),
        ]
        axes = [1]
    else:
        ids = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, 4, 4])]
        nodes = [
            helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers", "axes"], ["sums"], keepdims=0),
            helper.make_node("Unsqueeze", ["sums", "last"], ["vector"]),
        ]
        axes = [1, 2, 3]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes),
        helper.make_tensor("last", TensorProto.INT64, [1], [1]),
    ]
    output = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 1])
    model = helper.make_model(
        helper.make_graph(nodes, "tower", ids, [output], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, graph)
    plan = None
    if engine is Engine.TENSORRT:
        plan = graph.with_name("model.plan")
        plan.write_bytes(b"a plan")
        plan_of_tower(plan, modality, context)
    config = tower_config(
        folder,
        graph,
        engine=engine,
        precision=precision,
        fingerprint="bt1:a",
        max_batch_size=64,
        context_length=context,
        plan=plan,
        settings=TowerSettings(**settings),  # type: ignore[arg-type]
    )
    (folder / "config.pbtxt").write_text(config.to_pbtxt())
    return folder


def plan_of_tower(plan: Path, modality: Modality, context: int) -> None:
    """A plan's manifest with two profiles, the second of which ends at 32 rows."""
    names = ("input_ids", "attention_mask") if modality is Modality.TEXT else ("pixels",)
    dims = ("batch", "sequence") if modality is Modality.TEXT else ("batch", "3", "4", "4")
    sequence = {"sequence": Extent(1, 8, context)} if modality is Modality.TEXT else {}
    PlanManifest(
        compiler="tensorrt",
        compiler_version="11.4.0",
        cuda="13.0",
        gpu="A GPU",
        compute_capability="9.0",
        portability="none",
        version_compatible=False,
        precision="fp16",
        profiles=(
            Profile({"batch": Extent(1, 1, 1), **sequence}),
            Profile({"batch": Extent(1, 8, 32), **sequence}),
        ),
        inputs={name: TensorSpec("int64" if sequence else "uint8", dims) for name in names},
        outputs={"vector": TensorSpec("float32", ("batch", "1"))},
        kernels=KernelSummary(1, {}, 0, ()),
        plan_sha256=sha256_of_file(plan),
        plan_bytes=plan.stat().st_size,
        onnx="model.onnx",
        onnx_sha256="",
    ).write(plan)


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize(("engine", "precision"), [*CPU_FORMS, *GPU_FORMS])
def test_a_stock_backend_accepts_the_configuration_as_it_is(
    engine: Engine, precision: Precision, modality: Modality, tmp_path: Path
) -> None:
    folder = tower(tmp_path / "t", modality, engine, precision)
    config = require_accepted(folder)
    assert config.backend == ("onnxruntime" if engine is Engine.CUDA else engine.value)
    assert engine_of_config_text((folder / "config.pbtxt").read_text(), origin="it") is engine
    said = {key: value.string_value for key, value in config.parameters.items()}
    assert (said.get("HINT_BF16") == "YES") is ((engine, precision) == (Engine.OPENVINO, Precision.BF16))
    assert said["babeltower_fingerprint"] == "bt1:a"


def test_warm_up_sends_texts_of_real_lengths_within_the_context(tmp_path: Path) -> None:
    config = require_accepted(tower(tmp_path / "t", Modality.TEXT, Engine.ONNXRUNTIME, Precision.FP32))
    shapes = [(warmup.batch_size, warmup.inputs["input_ids"].dims[0]) for warmup in config.model_warmup]
    assert {(1, 8), (1, 16), (8, 8), (8, 16), (32, 16), (1, CONTEXT)} <= set(shapes)
    assert max(tokens for _, tokens in shapes) == CONTEXT
    assert len(set(shapes)) == len(shapes)
    assert sum(rows * tokens for rows, tokens in shapes) < 2_000
    whole = require_accepted(tower(tmp_path / "o", Modality.TEXT, Engine.OPENVINO, Precision.FP32))
    assert sorted(tuple(w.inputs["input_ids"].dims) for w in whole.model_warmup) == sorted(shapes)


def test_threads_and_instances_are_said_as_each_backend_counts_them() -> None:
    two = TowerSettings(instances=2, threads=3)
    onnxruntime = operation_of_tower(Engine.ONNXRUNTIME, Precision.FP32, two)
    assert onnxruntime.parameters["intra_op_thread_count"] == "3"  # of a session; each instance has one
    openvino = operation_of_tower(Engine.OPENVINO, Precision.INT8, two)
    assert openvino.parameters == {"NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "6"}
    assert {operation.instances.count for operation in (onnxruntime, openvino)} == {2}
    assert operation_of_tower(Engine.TENSORRT, Precision.FP16, TowerSettings(2)).instances.kind == "KIND_GPU"


@pytest.mark.parametrize(
    ("engine", "precision", "settings", "message"),
    [
        (Engine.TENSORRT, Precision.FP16, {"threads": 2}, "for tensorrt runs on a GPU and has no threads"),
        (Engine.CUDA, Precision.FP16, {"threads": 2}, "for cuda runs on a GPU and has no threads"),
        (Engine.ONNXRUNTIME, Precision.FP32, {"threads": 0}, "at least 1"),
    ],
)
def test_what_an_engine_cannot_do_is_an_error(
    engine: Engine, precision: Precision, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        operation_of_tower(engine, precision, TowerSettings(**settings))  # type: ignore[arg-type]


def test_a_tower_for_cuda_runs_on_the_gpu_without_tf32(tmp_path: Path) -> None:
    folder = tower(tmp_path / "t", Modality.IMAGE, Engine.CUDA, Precision.FP32, instances=2)
    config = require_accepted(folder)
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_GPU")
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})
    said = {key: value.string_value for key, value in config.parameters.items()}
    assert {key: said[key] for key in ("arena_extend_strategy", "cudnn_conv_algo_search")} == {
        "arena_extend_strategy": "1",
        "cudnn_conv_algo_search": "1",
    }
    assert [tensor.data_type for tensor in config.input] == [model_config_pb2.TYPE_UINT8]
    assert [tensor.data_type for tensor in config.output] == [model_config_pb2.TYPE_FP32]


@pytest.mark.parametrize("engine", [Engine.CUDA, Engine.TENSORRT])
def test_requests_to_a_gpu_are_joined_into_the_rows_of_a_bucket(engine: Engine, tmp_path: Path) -> None:
    text = require_accepted(tower(tmp_path / "t", Modality.TEXT, engine, Precision.FP16, context=77))
    image = require_accepted(tower(tmp_path / "i", Modality.IMAGE, engine, Precision.FP16))
    assert tuple(text.dynamic_batching.preferred_batch_size) == text_buckets(77, max_rows=64).rows
    assert tuple(image.dynamic_batching.preferred_batch_size) == image_buckets(max_rows=64).rows


def test_warm_up_on_a_gpu_sends_every_length_and_the_largest_shapes(tmp_path: Path) -> None:
    config = require_accepted(tower(tmp_path / "t", Modality.TEXT, Engine.CUDA, Precision.FP16, context=77))
    shapes = [(w.batch_size, w.inputs["input_ids"].dims[0]) for w in config.model_warmup]
    assert {length for _, length in shapes} == set(text_buckets(77).lengths)
    assert {(1, 8), (64, 8), (1, 77), (64, 77)} <= set(shapes)
    images = require_accepted(tower(tmp_path / "i", Modality.IMAGE, Engine.CUDA, Precision.FP16))
    assert [w.batch_size for w in images.model_warmup] == [64, 1]


def test_tensorrt_captures_the_small_shapes_that_a_profile_admits(tmp_path: Path) -> None:
    text = require_accepted(tower(tmp_path / "t", Modality.TEXT, Engine.TENSORRT, Precision.FP16, context=77))
    shapes = {(g.batch_size, g.input["input_ids"].dim[0]) for g in text.optimization.cuda.graph_spec}
    expected = {
        (rows, length)
        for rows, length in text_buckets(77, max_rows=64).shapes
        if rows * length <= 2_048 and rows <= 32
    }
    assert shapes == expected
    assert len(shapes) > 20
    image = require_accepted(tower(tmp_path / "i", Modality.IMAGE, Engine.TENSORRT, Precision.FP16))
    assert [g.batch_size for g in image.optimization.cuda.graph_spec] == [1, 2, 4, 8, 16, 32]
    assert list(image.optimization.cuda.graph_spec[0].input["pixels"].dim) == [3, 4, 4]


def test_a_configuration_of_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ManifestError, match="it has no known tower backend"):
        engine_of_config_text('backend: "python"\n', origin="it")


def test_other_settings_leave_all_else_as_it_was(tmp_path: Path) -> None:
    folder = tower(tmp_path / "t", Modality.TEXT, Engine.ONNXRUNTIME, Precision.FP32)
    before = config_of_folder(folder)
    pinned = (folder / "config.pbtxt").read_text() + "version_policy { specific { versions: [ 3 ] } }\n"
    settings = TowerSettings(instances=2, threads=1)
    (folder / "config.pbtxt").write_text(resettled(pinned, Precision.FP32, settings))
    after = require_accepted(folder)
    assert after.parameters["intra_op_thread_count"].string_value == "1"
    assert list(after.version_policy.specific.versions) == [3]
    for field in ("name", "backend", "max_batch_size", "input", "output", "dynamic_batching", "model_warmup"):
        assert getattr(after, field) == getattr(before, field), field
    again = resettled((folder / "config.pbtxt").read_text(), Precision.FP32, TowerSettings())
    assert "intra_op_thread_count" not in again
    with pytest.raises(ExportError, match=r"not a tower's config\.pbtxt"):
        resettled('backend: "python"', Precision.FP32, settings)
    with pytest.raises(ExportError, match="pass the threads of each"):
        resettled(pinned, Precision.FP32, TowerSettings(instances=2))


@pytest.mark.parametrize("engine", [Engine.CUDA, Engine.TENSORRT])
def test_more_instances_on_a_gpu_leave_its_optimization_alone(engine: Engine, tmp_path: Path) -> None:
    folder = tower(tmp_path / "t", Modality.TEXT, engine, Precision.FP16)
    before = config_of_folder(folder)
    (folder / "config.pbtxt").write_text(
        resettled((folder / "config.pbtxt").read_text(), Precision.FP16, TowerSettings(3))
    )
    after = require_accepted(folder)
    assert settings_of_config(after) == TowerSettings(3)
    assert after.optimization == before.optimization
    assert after.parameters == before.parameters
    with pytest.raises(ExportError, match="leave threads out"):
        resettled((folder / "config.pbtxt").read_text(), Precision.FP16, TowerSettings(1, threads=2))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize(
    "settings", [TowerSettings(), TowerSettings(2, 3), TowerSettings(4), TowerSettings(1, 1)]
)
def test_settings_read_back_as_they_were_written(
    engine: Engine, settings: TowerSettings, tmp_path: Path
) -> None:
    config = config_of_folder(tower(tmp_path / "t", Modality.TEXT, engine, Precision.FP32))
    resettle(config, Precision.FP32, settings)
    assert settings_of_config(config) == settings


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_the_backends_from_pip_open_the_same_folder(
    engine: Engine, modality: Modality, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.protobuf import json_format

    pytest.importorskip(engine.value)
    name = f"t_{modality.value}_tower_fp32"
    folder = tower(tmp_path / name, modality, engine, Precision.FP32, instances=2, threads=2)
    as_triton_says = json_format.MessageToDict(config_of_folder(folder), preserving_proto_field_name=True)
    parsed = tower_config_from_triton(json.dumps(as_triton_says), engine)
    assert (parsed.threads, parsed.batched) == (2, engine is Engine.ONNXRUNTIME)
    opened: list[object] = []
    module = __import__("onnxruntime") if engine is Engine.ONNXRUNTIME else __import__("openvino")
    what, method = (
        (module, "InferenceSession") if engine is Engine.ONNXRUNTIME else (module.Core, "compile_model")
    )
    original = getattr(what, method)
    monkeypatch.setattr(what, method, lambda *a, **k: opened.append(a) or original(*a, **k))
    TowerServer(folder / "1", parsed, engine).close()
    assert len(opened) == 1
    wrong = as_triton_says | {"output": [{"name": "vector", "data_type": "TYPE_FP16", "dims": ["1"]}]}
    with pytest.raises(EngineError, match=r"config\.pbtxt has output"):
        TowerServer(folder / "1", tower_config_from_triton(json.dumps(wrong), engine), engine)
