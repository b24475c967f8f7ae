"""Stand-ins for CUDA and TensorRT on a machine without a GPU.

``FakeGpu`` stands for CUDA's bindings over host memory. ``RunningTensorRt`` stands for the library: a "plan"
holds the ONNX file, and a context runs it with ONNX Runtime. So all of our own code (profiles, buffers,
captured graphs, manifests, the export and its gate) runs as it would, on vectors that mean something; what
TensorRT itself would make of a graph, it says nothing about. As on a GPU, where kernels are chosen by shape,
the rounding error of a vector depends on the shape of its batch.
"""

# ruff: noqa: N802 - CUDA's and TensorRT's own names

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from export.tensorrt.kernels import expected_types

ROUNDING = {"fp32": 1e-7, "fp16": 1e-4, "bf16": 1e-3, "int8": 1e-3, "fp8": 1e-3}
"""Precision → standard deviation of a component's rounding error, which depends on the batch's shape."""


class FakeGpu:
    """CUDA's bindings over host memory; graphs are lists of queued work."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(  # noqa: N815
        cudaStreamCaptureModeGlobal=0, cudaStreamCaptureModeThreadLocal=1, cudaStreamCaptureModeRelaxed=2
    )
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.recording: list[Any] | None = None
        self.graphs: list[list[Any]] = []
        self.calls: list[str] = []
        self.failing = ""
        self._n_devices = 1

    def __getattr__(self, function: str) -> Any:
        work = getattr(type(self), f"_{function}", None)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(function)
            if function == self.failing:
                return (2, None)
            result = work(self, *arguments) if work else None
            return (0, result)

        return call

    def queue(self, work: Any) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _cudaGetDeviceCount(self) -> int:
        return self._n_devices

    def _cudaGetErrorString(self, status: int) -> bytes:
        return b"out of memory" if status else b"no error"

    def _cudaDeviceGetAttribute(self, which: int, index: int) -> int:
        return (8, 9)[which]

    def _cudaGetDeviceProperties(self, index: int) -> Any:
        return SimpleNamespace(name=b"NVIDIA L4\0\0")

    def _cudaRuntimeGetVersion(self) -> int:
        return 13_000

    def _cudaDriverGetVersion(self) -> int:
        return 13_000

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == 1, "a blocking stream waits for the default one"
        return 77

    def _cudaEventCreate(self) -> list[float]:
        return []

    def _cudaEventRecord(self, event: list[float], stream: int) -> None:
        self.queue(lambda: event.append(time.perf_counter()))

    def _cudaEventElapsedTime(self, start: list[float], end: list[float]) -> float:
        return 1e3 * (end[-1] - start[-1])

    def _cudaMalloc(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def _cudaFree(self, address: int) -> None:
        del self.memory[address]

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.queue(lambda: ctypes.memmove(to, source, size))

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.recording = []

    def _cudaStreamEndCapture(self, stream: int) -> list[Any]:
        recorded, self.recording = self.recording, None
        return recorded or []

    def _cudaGraphInstantiate(self, graph: list[Any], flags: int) -> list[Any]:
        self.graphs.append(graph)
        return graph

    def _cudaGraphExecDestroy(self, graph: list[Any]) -> None:
        self.graphs.remove(graph)

    def _cudaGraphLaunch(self, graph: list[Any], stream: int) -> None:
        for work in graph:
            work()


class RunningTensorRt(ModuleType):
    """The library, from building a plan to running it.

    ``listed`` replaces the type of every product in the inspector's listing, as of a compiler that does not
    honour the graph; ``lists_nodes`` is whether kernels name the nodes that they cover; ``noise`` is added to
    all that is computed.
    """

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="vc", WEIGHT_STREAMING="ws")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere", SAME_COMPUTE_CAPABILITY="same")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    LayerInformationFormat = SimpleNamespace(JSON="json")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal"

        def __init__(self) -> None:
            pass

    def __init__(self, gpu: FakeGpu, version: str = "10.16.1") -> None:
        super().__init__("tensorrt")
        self.__version__, self.__spec__ = version, ModuleSpec("tensorrt", None)
        self.gpu = gpu
        self.asked: list[Any] = []
        self.listed: str | None = None
        self.lists_nodes = True
        self.has_inspector = True
        self.tactic = ""
        self.refuses_profiles = False
        self.fails_to_build = False
        self.streamable_weights_size = 0
        self.profiles: list[dict[str, tuple[Sequence[int], ...]]] = []
        self.noise = 0.0
        self.graph = Path()
        self.engines: list[Any] = []

    def Builder(self, log: Any) -> Any:
        self.profiles, self.log = [], log
        self.config = SimpleNamespace(
            set_flag=lambda flag: self.asked.append(("set", flag)),
            clear_flag=lambda flag: self.asked.append(("clear", flag)),
            set_memory_pool_limit=lambda pool, size: self.asked.append((pool, size)),
            add_optimization_profile=self._add_profile,
            create_timing_cache=lambda data: None if data == b"other" else "cache",
            set_timing_cache=lambda cache, ignore_mismatch: not ignore_mismatch,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"t"),
        )
        return SimpleNamespace(
            create_network=lambda flags: self.asked.append(("network", flags)),
            create_builder_config=lambda: self.config,
            create_optimization_profile=_Profile,
            build_serialized_network=lambda network, config: self._built(),
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:
        def parse(path: str) -> bool:
            self.graph = Path(path)
            return True

        return SimpleNamespace(parse_from_file=parse)

    def Runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._load, engine_host_code_allowed=False)

    def _add_profile(self, profile: _Profile) -> int:
        if self.refuses_profiles:
            self.log.log("error", "profile 0 is not valid")
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def _built(self) -> bytes | None:
        if self.fails_to_build:
            return None
        return json.dumps(self.profiles).encode() + b"\n" + self.graph.read_bytes()

    def _load(self, plan: bytes) -> Any:
        profiles, graph = plan.split(b"\n", 1)
        facts = {"profiles": json.loads(profiles), "graph": graph}
        proto = onnx.load_from_string(graph).graph
        names = [value.name for value in (*proto.input, *proto.output)]
        engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            num_optimization_profiles=len(facts["profiles"]),
            device_memory_size_v2=1024,
            streamable_weights_size=self.streamable_weights_size,
            get_weight_streaming_automatic_budget=lambda: 7,
            create_execution_context=lambda strategy: _Context(self, facts),
            create_engine_inspector=lambda: (
                SimpleNamespace(get_engine_information=self._listing) if self.has_inspector else None
            ),
        )
        self.engines.append(engine)
        return engine

    def _listing(self, form: str) -> str:
        """Every product a kernel of its own, as ``get_engine_information`` of the release writes them."""
        assert form == "json"
        is_11 = self.__version__.startswith("11.")
        kernels = []
        for name, dtype in expected_types(onnx_ir.load(self.graph)).items():
            listed = self.listed or dtype
            types = {"Format": f"{listed} (kLINEAR)", "DataType": listed}
            tensor = {"Name": "t", "Dimensions": [-1, 4], **(types if is_11 else {"Format/Datatype": listed})}
            nodes = f"[ONNX Layer: {name}]\x1f[ONNX Layer: other/Cast]" if self.lists_nodes else ""
            kernel = {"Name": f"{name}_myl0_1", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [tensor]}
            kernels.append({**kernel, "TacticName": self.tactic, "StreamId": 0, "Metadata": nodes})
        return json.dumps({"Layers": kernels, "I/O Tensors" if is_11 else "Bindings": []})


def install(patch: pytest.MonkeyPatch) -> RunningTensorRt:
    """Put a library and its GPU in the place of TensorRT and CUDA's bindings; return the library."""
    gpu = FakeGpu()
    library = RunningTensorRt(gpu)
    patch.setitem(sys.modules, "cuda.bindings.runtime", gpu)
    patch.setitem(sys.modules, "tensorrt", library)
    return library


def session_of(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """Open a graph in ONNX Runtime on a CPU, which simulates FP8: its Q/DQ nodes round to E4M3.

    Without extended optimisations, since these replace pairs of Q/DQ by kernels that do not exist for FP8.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    opened = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])


def _widened(model: onnx.ModelProto) -> bytes:
    """A graph in BF16 with its types in FP32, since ONNX Runtime has no BF16 products on a CPU.

    Its weights are rounded to BF16; ``ROUNDING`` stands for the rounding of its activations.
    """
    graph, wide = onnx_ir.serde.deserialize_model(model).graph, onnx_ir.DataType.FLOAT
    for value in list(graph.initializers.values()):
        if value.dtype is onnx_ir.DataType.BFLOAT16 and value.const_value is not None:
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = wide
    for node in graph:
        for output in node.outputs:
            if output.dtype is onnx_ir.DataType.BFLOAT16:
                output.dtype = wide
                if node.op_type == "Cast":
                    node.attributes["to"] = onnx_ir.AttrInt64("to", wide.value)
    widened = onnx_ir.Model(graph, ir_version=model.ir_version)
    return bytes(onnx_ir.serde.serialize_model(widened).SerializeToString())


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Sequence[int], ...]] = {}

    def set_shape(self, name: str, *corners: Sequence[int]) -> None:
        self.shapes[name] = corners


class _Context:
    """Runs the ONNX file on what lies at the addresses."""

    def __init__(self, library: RunningTensorRt, facts: dict[str, Any]) -> None:
        self.library, self.gpu, self.facts, self.index = library, library.gpu, facts, 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        model = onnx.load_from_string(facts["graph"])
        precision = next((p.value for p in model.metadata_props if p.key == "babeltower.precision"), "fp32")
        self.rounding = ROUNDING[precision]
        self.session = session_of(_widened(model) if precision == "bf16" else facts["graph"])

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.index = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self.gpu.memory[address]) >= size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        least, _, most = self.facts["profiles"][self.index][name]
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self.shapes)
        self.gpu.queue(lambda: self._run(shapes))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        types = {"tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
        feeds = {}
        for value in self.session.get_inputs():
            shape, dtype = shapes[value.name], np.dtype(types[value.type])
            array = np.empty(shape, dtype)
            ctypes.memmove(array.ctypes.data, self.addresses[value.name], math.prod(shape) * dtype.itemsize)
            feeds[value.name] = array
        random = np.random.default_rng([size for _, shape in sorted(shapes.items()) for size in shape])
        noise = math.hypot(self.library.noise, self.rounding)
        for value, exact in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            found = exact + (noise * random.standard_normal(exact.shape)).astype(exact.dtype)
            found /= np.linalg.norm(found, axis=1, keepdims=True)
            ctypes.memmove(self.addresses[value.name], np.ascontiguousarray(found).ctypes.data, found.nbytes)
