"""Stand-ins for CUDA and ONNX Runtime's CUDA provider on a machine without a GPU.

``CudaBindings`` stands for NVIDIA's bindings over host memory. ``CudaOnnxRuntime`` stands for the GPU build
of ONNX Runtime: its sessions run the graph on the processor, on inputs and outputs that are bound by address,
with the graph's own rounding. As ONNX Runtime's documentation of CUDA graphs says, the first run with a
``gpu_graph_id`` captures and later ones replay, with the addresses and shapes of the capture. The stand-in
refuses a replay with others, which would read wrong memory. As in ONNX Runtime, a capture belongs to its
session and thread, and is of CUDA's global mode: as CUDA's documentation says, another thread's allocation
then fails and spoils the capture, unless that thread's mode is relaxed. A session that is opened or closed
during a capture of another thread fails as well.
"""

# ruff: noqa: N802, N815 - the libraries' own names

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from tensorrt_double import FakeGpu

from export.precision.simulation import simulated_from_onnx

__all__ = ["CudaBindings", "CudaOnnxRuntime", "install"]

UNSAFE = {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost"}
"""Calls that CUDA forbids while another thread captures in global mode."""


class CudaBindings(FakeGpu):
    """CUDA's bindings, with page-locked memory and several streams."""

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self) -> None:
        super().__init__()
        self.capturing: threading.Thread | None = None
        self.spoilt: list[str] = []
        self.during_capture: Callable[[], None] = lambda: None
        self.allocated = threading.Event()
        self._modes: dict[threading.Thread, int] = {}

    def __getattr__(self, function: str) -> Any:
        if function not in UNSAFE or not self.is_captured_elsewhere():
            return super().__getattr__(function)
        self.allocated.set()
        if (
            self._modes.get(threading.current_thread())
            == self.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        ):
            return super().__getattr__(function)
        self.spoilt.append(function)
        return lambda *arguments: (900, None)

    def is_captured_elsewhere(self) -> bool:
        capturing = self.capturing
        return capturing is not None and capturing is not threading.current_thread()

    def _cudaThreadExchangeStreamCaptureMode(self, mode: int) -> int:
        before = self._modes.get(threading.current_thread(), 0)
        self._modes[threading.current_thread()] = mode
        return before

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._cudaMalloc(size)

    def _cudaFreeHost(self, address: int) -> None:
        self._cudaFree(address)

    def _cudaDriverGetVersion(self) -> int:
        return 13_000


class CudaOnnxRuntime:
    """The module ``onnxruntime`` of the GPU build; ``captures`` and ``runs`` count over all sessions."""

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(self, folder: Path, gpu: CudaBindings) -> None:
        self.folder, self.gpu = folder, gpu
        self.sessions = itertools.count()
        self.captures: list[tuple[int, str]] = []
        self.runs = 0
        self.threads: set[threading.Thread] = set()
        self.graph_sessions: list[bool] = []
        self.device_ids: set[str] = set()
        self.providers: Any = None
        self.config: dict[str, str] = {}
        self.refuses = ""
        self.provider = "CUDAExecutionProvider"
        self.InferenceSession = lambda *arguments, **named: _Session(self, *arguments, **named)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class _Session:
    computes = True

    def __init__(self, module: CudaOnnxRuntime, graph: str, options: Any, *, providers: Any) -> None:
        if module.refuses:
            raise RuntimeError(module.refuses)
        if module.gpu.is_captured_elsewhere():
            module.gpu.spoilt.append("InferenceSession")
            raise RuntimeError("operation not permitted when stream is capturing")
        self._module, module.providers = module, providers
        self._number = next(module.sessions)
        module.threads.add(threading.current_thread())
        key = "session.disable_cpu_ep_fallback"
        module.config[key] = options.get_session_config_entry(key)
        runnable = module.folder / f"{abs(hash(graph))}" / "model.onnx"
        runnable.parent.mkdir(parents=True, exist_ok=True)
        model = onnx_ir.load(graph)
        self._packs_text = any(node.op_type == "RemovePadding" for node in model.graph)
        module.device_ids.add(providers[0][1]["device_id"])
        module.graph_sessions += [providers[0][1]["enable_cuda_graph"] == "1"]
        has_bfloat16 = any(v.dtype == onnx_ir.DataType.BFLOAT16 for n in model.graph for v in n.outputs)
        if has_bfloat16 or self._packs_text:  # a processor has no kernels for these
            simulated_from_onnx(Path(graph), runnable, data_name="model.data")
            graph = str(runnable)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, quiet)
        self._captured: dict[tuple[threading.Thread, str], tuple[Any, ...]] = {}

    def get_providers(self) -> list[str]:
        return [self._module.provider, "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        bound = (tuple(binding.inputs.items()), tuple(binding.outputs.items()))
        key = threading.current_thread(), number
        self._module.threads.add(key[0])
        if number == "-1":
            self._compute(binding)
        elif key in self._captured:
            if self._captured[key] != bound:
                raise RuntimeError(f"graph {number} was captured for other addresses or shapes")
            self._compute(binding)
        else:
            self._capture(binding)
            self._captured[key] = bound
            self._module.captures.append((self._number, number))
        self._module.runs += 1

    def _capture(self, binding: _Binding) -> None:
        gpu = self._module.gpu
        if gpu.capturing is not None:
            raise RuntimeError("two captures at once")
        gpu.capturing, n_spoilt = threading.current_thread(), len(gpu.spoilt)
        if self._packs_text:
            raise RuntimeError("CUDA error 900: RemovePadding waits for the stream that is being captured")
        try:
            gpu.during_capture()
            self._compute(binding)
        finally:
            gpu.capturing = None
        if len(gpu.spoilt) > n_spoilt:
            raise RuntimeError(f"CUDA error 901: {gpu.spoilt[-1]} invalidated the capture")

    def _compute(self, binding: _Binding) -> None:
        if not self.computes:
            return
        feeds = {name: _array(*held).copy() for name, held in binding.inputs.items()}
        for name, found in zip(binding.outputs, self._session.run(list(binding.outputs), feeds), strict=True):
            address, dtype, shape = binding.outputs[name]
            assert found.shape == shape, (name, found.shape, shape)
            assert found.dtype == dtype
            _array(address, dtype, shape)[...] = found


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[int, Any, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[int, Any, tuple[int, ...]]] = {}

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int
    ) -> None:
        assert device == "cuda"
        self.inputs[name] = (address, dtype, tuple(shape))

    def bind_output(
        self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int
    ) -> None:
        assert device == "cuda"
        self.outputs[name] = (address, dtype, tuple(shape))


def _array(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
    return memory.view(dtype).reshape(shape)


def install(monkeypatch: Any, folder: Path) -> tuple[CudaBindings, CudaOnnxRuntime]:
    """Make both stand-ins the installed libraries, for one test."""
    gpu = CudaBindings()
    module = CudaOnnxRuntime(folder, gpu)
    monkeypatch.setattr("runtime.backends.cuda.import_optional", lambda *arguments, **named: gpu)
    monkeypatch.setattr("runtime.backends.onnxruntime_cuda.preload", lambda: module)
    monkeypatch.setattr("runtime.backends.onnxruntime_cuda.require_cuda_build", lambda: module)
    return gpu, module
