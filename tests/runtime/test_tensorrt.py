"""TensorRT plans at run time: what is decided before a GPU is touched, and what is asked of one.

No GPU is needed: ``FakeGpu`` stands for CUDA's bindings and ``FakeTensorRt`` for the library. A plan's
"kernels" copy: the fake computes each output as the row sums of its inputs.
"""

# ruff: noqa: N802 - CUDA's and TensorRT's own names

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tensorrt_double import FakeGpu

from runtime.backends import open_backend
from runtime.backends import tensorrt as backend_module
from runtime.backends.cuda import open_device
from runtime.backends.plan_checks import profile_for, require_fit, sizes_of_inputs
from runtime.backends.plans import (
    AHEAD_OF_TIME,
    DeviceFacts,
    Extent,
    KernelSummary,
    PlanManifest,
    Profile,
    TensorSpec,
    plan_manifest_path,
)
from runtime.errors import EngineError, ManifestError
from runtime.manifest import Engine, Precision, sha256_of_file
from runtime.preprocessing.buckets import text_buckets

ADA = DeviceFacts(name="NVIDIA L4", compute_capability="8.9", cuda="13.0")
ALONE = Profile({"batch": Extent(1, 1, 1), "sequence": Extent(1, 16, 77)})
SHORT = Profile({"batch": Extent(1, 8, 32), "sequence": Extent(1, 16, 32)})
LONG = Profile({"batch": Extent(1, 8, 32), "sequence": Extent(1, 32, 77)})
PROFILES = (ALONE, SHORT, LONG)
INPUTS = {name: TensorSpec("int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")}
OUTPUTS = {"vector": TensorSpec("float32", ("batch", "4"))}


def manifest_of(**changes: Any) -> PlanManifest:
    facts = {
        "compiler": "tensorrt",
        "compiler_version": "10.16.1",
        "cuda": ADA.cuda,
        "gpu": ADA.name,
        "compute_capability": ADA.compute_capability,
        "portability": "none",
        "version_compatible": False,
        "precision": "fp16",
        "profiles": PROFILES,
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "kernels": KernelSummary(1, {"Half": 1}, 0, ()),
        "plan_sha256": "",
        "plan_bytes": 0,
        "onnx": "model.onnx",
        "onnx_sha256": "",
    }
    return PlanManifest(**{**facts, **changes})


def written(folder: Path, **changes: Any) -> Path:
    plan = folder / "model.plan"
    plan.write_bytes(b"plan")
    facts = {"plan_sha256": sha256_of_file(plan), "plan_bytes": 4, **changes}
    manifest_of(**facts).write(plan)
    return plan


class FakeContext:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.profile, self.addresses = gpu, -1, {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self.gpu.memory[address]) >= size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return PROFILES[self.profile].admits(dict(zip(("batch", "sequence"), shape, strict=True)))

    def execute_async_v3(self, stream: int) -> bool:
        shape = self.shapes["input_ids"]

        def work() -> None:
            ids = np.frombuffer(self.gpu.memory[self.addresses["input_ids"]], np.int64)
            sums = ids[: shape[0] * shape[1]].reshape(shape).sum(1)
            vectors = np.repeat(sums[:, None], 4, axis=1).astype(np.float32)
            ctypes.memmove(self.addresses["vector"], vectors.ctypes.data, vectors.nbytes)

        self.gpu.queue(work)
        return True


class FakeTensorRt(ModuleType):
    """The part of the library that running a plan uses."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal"

        def __init__(self) -> None:
            pass

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__("tensorrt")
        self.__version__ = "10.16.1"
        self.gpu, self.contexts = gpu, []
        self.tensors = [*INPUTS, *OUTPUTS]
        self.loads = True
        self.streamable_bytes = 0
        self.engine: Any = None

    def Runtime(self, log: Any) -> Any:
        def load(plan: bytes) -> Any:
            if not self.loads:
                log.log("error", "magic tag does not match.")
                return None
            self.engine = SimpleNamespace(
                num_io_tensors=len(self.tensors),
                get_tensor_name=lambda index: self.tensors[index],
                num_optimization_profiles=3,
                device_memory_size_v2=1024,
                streamable_weights_size=self.streamable_bytes,
                get_weight_streaming_automatic_budget=lambda: 300,
                create_execution_context=self.make_context,
            )
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=load, engine_host_code_allowed=False)

    def make_context(self, strategy: str) -> FakeContext:
        self.contexts.append(FakeContext(self.gpu))
        return self.contexts[-1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


@pytest.fixture
def library(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = FakeTensorRt(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.fixture
def backend(library: FakeTensorRt, tmp_path: Path) -> Iterator[Any]:
    opened = open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16)
    yield opened
    opened.close()


def inputs_of(batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 99, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def assert_right(backend: Any, batch: int, sequence: int, seed: int = 0) -> None:
    inputs = inputs_of(batch, sequence, seed)
    (found,) = backend.run(inputs, ["vector"])
    np.testing.assert_array_equal(found, np.repeat(inputs["input_ids"].sum(1)[:, None], 4, 1))


def test_a_shape_is_captured_at_its_first_run_and_replayed(
    backend: Any, gpu: FakeGpu, library: FakeTensorRt
) -> None:
    for seed in range(3):
        assert_right(backend, 3, 5, seed)
        assert (len(gpu.graphs), gpu.calls.count("cudaGraphLaunch")) == (1, seed + 1)
    captured_from = library.contexts[-1]
    assert captured_from.shapes["input_ids"] == (4, 8), "batches are padded to a bucket"
    assert_right(backend, 2, 9)
    assert captured_from.shapes["input_ids"] == (4, 8), "a captured graph's context must not change"
    assert_right(backend, 4, 8, seed=9)
    assert len(gpu.graphs) == 2


def test_rows_of_an_earlier_batch_do_not_leak_into_a_smaller_one(backend: Any) -> None:
    assert_right(backend, 4, 8, seed=1)
    inputs = inputs_of(3, 6)
    (found,) = backend.run(inputs, ["vector"])
    assert found.shape == (3, 4)
    np.testing.assert_array_equal(found[:, 0], inputs["input_ids"].sum(1))


def test_few_captures_serve_many_requests(backend: Any, gpu: FakeGpu) -> None:
    """10,000 requests of 1 to 32 texts, of lengths as captions have: median 13 tokens, a few of 77."""
    random = np.random.default_rng(0)
    shapes = set()
    for _ in range(10_000):
        n_rows = int(random.integers(1, 33))
        longest = int(np.clip(random.lognormal(2.6, 0.45, n_rows), 3, 77).max())
        shapes.add((n_rows, longest))
        backend.run({name: np.ones((n_rows, longest), np.int64) for name in INPUTS}, ["vector"])
    n_captures = gpu.calls.count("cudaGraphInstantiate")
    assert len(shapes) > 500
    assert n_captures <= len(text_buckets(77, max_rows=32).shapes)
    assert n_captures <= gpu.calls.count("cudaGraphLaunch") / 100 == 100


def test_the_timed_span_holds_the_launch_alone(backend: Any, gpu: FakeGpu) -> None:
    """Not the first run's context and capture: one warm-up run would not remove them from the samples."""
    for seed in range(3):
        gpu.calls.clear()
        _, ms = backend.run_with_events(inputs_of(3, 5, seed), ["vector"])
        start, end = (i for i, call in enumerate(gpu.calls) if call == "cudaEventRecord")
        assert gpu.calls[start + 1 : end] == ["cudaGraphLaunch"]
        assert ms >= 0


def test_each_profile_has_buffers_of_its_largest_shape(backend: Any, gpu: FakeGpu) -> None:
    before = len(gpu.memory)
    for batch, sequence in ((1, 77), (4, 20), (4, 60), (32, 32)):
        assert_right(backend, batch, sequence)
    sizes = sorted(len(buffer) for buffer in gpu.memory.values())
    assert len(gpu.memory) - before == 3 * 3
    assert sizes.count(32 * 77 * 8) == sizes.count(32 * 32 * 8) == sizes.count(77 * 8) == 2


def test_captured_shapes_are_limited(backend: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "MAX_CAPTURED", 2)
    for sequence in (3, 12, 20, 3):
        for seed in range(3):
            assert_right(backend, 2, sequence, seed)
    assert len(gpu.graphs) == 2


def test_closing_gives_everything_back(library: FakeTensorRt, gpu: FakeGpu, tmp_path: Path) -> None:
    opened = open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16)
    for _ in range(2):
        assert_right(opened, 2, 3)
    opened.close()
    opened.close()
    assert not gpu.memory
    assert not gpu.graphs
    assert gpu.calls[-1] == "cudaStreamDestroy"
    with pytest.raises(EngineError, match="is closed"):
        opened.run(inputs_of(1, 1), ["vector"])


@pytest.mark.parametrize(
    ("sizes", "index"),
    [((1, 77), 0), ((1, 1), 0), ((2, 32), 1), ((32, 1), 1), ((2, 33), 2), ((32, 77), 2)],
)
def test_the_smallest_profile_that_fits_is_taken(sizes: tuple[int, int], index: int) -> None:
    assert profile_for(PROFILES, dict(zip(("batch", "sequence"), sizes, strict=True))) == index


def test_a_request_over_every_profile_is_refused_by_name(backend: Any) -> None:
    message = r"covers batch 33 × sequence 5; it has batch 1–1 × sequence 1–77; .* Send smaller"
    with pytest.raises(EngineError, match=message):
        backend.run(inputs_of(33, 5), ["vector"])
    assert_right(backend, 32, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.ones((1, 2), np.int64)}, r"inputs \['attention_mask', 'input_ids'\]; got"),
        (
            {**inputs_of(2, 3), "attention_mask": np.ones((2, 4), np.int64)},
            r"has shape \[2, 4\]; .* \[2, 3\]",
        ),
        ({**inputs_of(2, 3), "input_ids": np.ones((2, 3), np.int32)}, r"'input_ids' is int32\[2, 3\]"),
        ({**inputs_of(2, 3), "input_ids": np.ones(3, np.int64)}, r"'input_ids' is int64\[3\]"),
    ],
)
def test_inputs_that_do_not_fit_the_plan_are_named(inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        sizes_of_inputs(INPUTS, inputs)


def test_an_output_that_the_plan_lacks_is_named(backend: Any) -> None:
    with pytest.raises(EngineError, match="no output 'vector_64'"):
        backend.run(inputs_of(1, 1), ["vector_64"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compiler": "tensorrt-rtx", "note": AHEAD_OF_TIME}, "ahead-of-time build, not executed"),
        ({"precision": "int8"}, "computes in int8; fp16 was requested"),
        ({"compiler_version": "10.9.0"}, "built with TensorRT 10.9.0; 10.16.1 is installed"),
        ({"compiler_version": "11.1.0", "version_compatible": True}, "built with TensorRT 11.1.0"),
        ({"compiler_version": "10.17.0", "version_compatible": True}, "built with TensorRT 10.17.0"),
        ({"gpu": "NVIDIA A10"}, "built for NVIDIA A10"),
        ({"compute_capability": "8.6", "portability": "same-compute-capability"}, "capability 8.6"),
    ],
)
def test_a_plan_for_something_else_is_refused(
    changes: dict[str, Any], message: str, library: FakeTensorRt, gpu: FakeGpu, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        open_backend(Engine.TENSORRT, written(tmp_path, **changes), precision=Precision.FP16)
    assert not gpu.memory
    assert gpu.calls[-1] == "cudaStreamDestroy"


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"compiler_version": "10.9.0", "version_compatible": True}, ADA),
        ({"gpu": "NVIDIA RTX 4090", "portability": "same-compute-capability"}, ADA),
        ({"compute_capability": "8.0", "portability": "ampere-plus"}, ADA),
        ({"portability": "ampere-plus"}, DeviceFacts("NVIDIA B200", "10.0", "13.0")),
    ],
)
def test_a_portable_plan_is_accepted(changes: dict[str, Any], device: DeviceFacts) -> None:
    require_fit(manifest_of(**changes), Precision.FP16, "10.16.1", device)


def test_turing_does_not_run_an_ampere_plan() -> None:
    turing = DeviceFacts("NVIDIA T4", "7.5", "12.9")
    with pytest.raises(EngineError, match="this GPU is NVIDIA T4"):
        require_fit(manifest_of(portability="ampere-plus"), Precision.FP16, "10.16.1", turing)


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plan = written(tmp_path)
    facts = {"plan_sha256": sha256_of_file(plan), "plan_bytes": 4}
    assert PlanManifest.read(plan) == replace(manifest_of(), **facts)


def test_a_plan_that_is_not_its_manifest_s_is_refused(tmp_path: Path) -> None:
    plan = written(tmp_path)
    plan.write_bytes(b"nalp")
    with pytest.raises(ManifestError, match="is not the plan its manifest describes"):
        PlanManifest.read(plan)
    plan_manifest_path(plan).write_text("{")
    with pytest.raises(ManifestError, match="is not JSON"):
        PlanManifest.read(plan)
    plan_manifest_path(plan).write_text('{"format": "other"}')
    with pytest.raises(ManifestError, match="not of format 'babeltower-plan/1'"):
        PlanManifest.read(plan)
    plan_manifest_path(plan).unlink()
    with pytest.raises(ManifestError, match=r"no model\.plan\.json beside it"):
        PlanManifest.read(plan)


@pytest.mark.parametrize(("least", "usual", "most"), [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_an_extent_that_is_none_is_refused(least: int, usual: int, most: int) -> None:
    with pytest.raises(ManifestError, match="Invalid extent"):
        Extent(least, usual, most)


def test_a_missing_library_is_named(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"needs tensorrt, which is not installed.*babeltower\[tensorrt\]"):
        open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16)


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(
        cudaGetDeviceCount=lambda: (35, None),
        cudaGetErrorString=lambda status: (0, b"CUDA driver version is insufficient"),
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", none)
    with pytest.raises(EngineError, match="GPU 0 is not available: CUDA reports 'CUDA driver version is"):
        open_device()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match="A GPU needs cuda, which is not installed"):
        open_device()


def test_a_plan_that_the_library_cannot_load_is_named(library: FakeTensorRt, tmp_path: Path) -> None:
    library.loads = False
    with pytest.raises(EngineError, match="magic tag does not match"):
        open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16)
    library.loads, library.tensors = True, ["pixels", "vector"]
    with pytest.raises(EngineError, match=r"has tensors \['pixels', 'vector'\]"):
        open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16)


@pytest.mark.parametrize(("streamable", "kept"), [(1000, 300), (200, 200)])
def test_streamed_weights_stay_on_the_gpu_as_far_as_they_fit(
    streamable: int, kept: int, library: FakeTensorRt, tmp_path: Path
) -> None:
    library.streamable_bytes = streamable
    open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16).close()
    assert library.engine.weight_streaming_budget_v2 == kept


def test_weights_that_cannot_be_streamed_are_left_alone(library: FakeTensorRt, tmp_path: Path) -> None:
    open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16).close()
    assert not hasattr(library.engine, "weight_streaming_budget_v2")


def test_an_error_of_cuda_is_raised_with_its_reason(backend: Any, gpu: FakeGpu) -> None:
    gpu.failing = "cudaMemcpyAsync"
    with pytest.raises(EngineError, match="cudaMemcpyAsync failed on GPU 0: out of memory"):
        backend.run(inputs_of(1, 1), ["vector"])


def test_a_provider_means_nothing_to_tensorrt(library: FakeTensorRt, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="takes no provider; got 'CUDA'"):
        open_backend(Engine.TENSORRT, written(tmp_path), precision=Precision.FP16, provider="CUDA")


class FakeSession:
    """ONNX Runtime's session on a machine that lacks what the provider needs: it silently takes the CPU."""

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_provider_that_silently_becomes_the_cpu_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = "XnnpackExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(EngineError, match=f"'{provider}' was requested, but 'CPUExecutionProvider' would"):
        open_backend(Engine.ONNXRUNTIME, tmp_path / "model.onnx", precision=Precision.FP32, provider=provider)
