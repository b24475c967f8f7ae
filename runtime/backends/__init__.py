"""Opening a graph in an engine; the engine's own package is imported then, not before."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime.backends.backend import Backend, GraphBackend, Signature
from runtime.device import CPU, Device, device_from_name
from runtime.errors import EngineError
from runtime.manifest import GPU_ENGINES, GRAPH_ENGINES, Engine, Precision

GPU_PROVIDERS = {
    "CUDAExecutionProvider": "pass device='cuda', for variants exported with --engine cuda",
    "TensorrtExecutionProvider": "pass engine='tensorrt', for variants exported with --engine tensorrt",
    "NvTensorRTRTXExecutionProvider": "pass device='cuda', for variants exported with --engine cuda",
}
"""ONNX Runtime's providers that run other graphs than a CPU's, and how to use these."""

__all__ = [
    "GPU_PROVIDERS",
    "device_for_engine",
    "is_installed",
    "module_of_engine",
    "open_backend",
    "open_graph",
    "require_computes",
    "require_provider",
    "version_of_engine",
]


def module_of_engine(engine: Engine) -> str:
    """Return the name of an engine's Python module; CUDA is a provider of ONNX Runtime."""
    return Engine.ONNXRUNTIME.value if engine is Engine.CUDA else engine.value


def is_installed(engine: Engine) -> bool:
    """Return whether an engine's Python module is installed; nothing is imported."""
    return importlib.util.find_spec(module_of_engine(engine)) is not None


def version_of_engine(engine: Engine) -> str:
    """Return an installed engine's version: from its distribution, else its module (``tensorrt-cu12``).

    Of ONNX Runtime always from the module, since two folders may each hold a build of it.
    """
    name = module_of_engine(engine)
    if name == Engine.ONNXRUNTIME.value:
        return str(importlib.import_module(name).__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(name).__version__)


def require_provider(engine: Engine, provider: str | None) -> None:
    """Check the name of a provider, before anything is opened; whether it is available is not checked.

    Raises:
        EngineError: it is no name, or the provider of a GPU that has an engine of its own.
    """
    if provider is None:
        return
    if not isinstance(provider, str) or not provider:
        raise EngineError(f"provider is {provider!r}; expected a name, or leave it out for the CPU.")
    if engine is Engine.ONNXRUNTIME and provider in GPU_PROVIDERS:
        raise EngineError(
            f"{provider} cannot run a graph made for CPUs as it was measured: {GPU_PROVIDERS[provider]}."
        )


def device_for_engine(engine: Engine, device: Device | str | None) -> Device:
    """Return the device that an engine runs on: the given one, or else the processor or the first GPU.

    Raises:
        EngineError: the engine does not run on the given device.
    """
    on_gpu = engine in GPU_ENGINES
    if device is None:
        return Device(0) if on_gpu else CPU
    device = device_from_name(device)
    if device.is_gpu is not on_gpu:
        others = [known.value for known in (GPU_ENGINES if device.is_gpu else GRAPH_ENGINES)]
        raise EngineError(
            f"Engine {engine.value} does not run on {device}; {others} do. Pass one of them, or "
            f"device={'cuda' if on_gpu else 'cpu'!r}."
        )
    return device


def open_backend(
    engine: Engine,
    graph: Path,
    *,
    precision: Precision,
    threads: int | None = None,
    provider: str | None = None,
    instances: int = 1,
    device: Device | str | None = None,
) -> Backend:
    """Open a graph in an engine.

    Args:
        engine: Engine to open the graph in; there is no fallback to another.
        graph: ONNX file with its external data beside it; for TensorRT, a plan with its manifest.
        precision: Arithmetic of the matrix products.
        threads: Threads per run; ``None`` uses every physical core. A GPU ignores it.
        provider: ONNX Runtime's execution provider (``CPUExecutionProvider`` by default) or OpenVINO's
            device (``CPU`` by default). A GPU has none.
        instances: Concurrent runs, of ``threads`` threads each; a GPU computes one at a time.
        device: ``None`` for the engine's own: the processor, or the first GPU.

    Raises:
        EngineError: the engine is not installed, does not know the provider, does not run on the device,
            cannot compute in the precision, or cannot read the graph.
    """
    place = device_for_engine(engine, device)
    if place.gpu is not None and provider is not None:
        raise EngineError(f"{engine.value} takes no provider; got {provider!r}. Pass device='cuda:N'.")
    if engine is Engine.CUDA:
        _require_sane(graph, threads, instances)
        from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(graph, precision=precision, gpu=place.gpu or 0)
    if engine is not Engine.TENSORRT:
        return open_graph(
            engine, graph, precision=precision, threads=threads, provider=provider, instances=instances
        )
    _require_sane(graph, threads, instances)
    from runtime.backends.tensorrt import TensorRtBackend

    return TensorRtBackend(graph, precision=precision, gpu=place.gpu or 0)


def open_graph(
    engine: Engine,
    graph: Path,
    *,
    precision: Precision,
    threads: int | None = None,
    provider: str | None = None,
    instances: int = 1,
) -> GraphBackend:
    """Open an ONNX graph in one of ``GRAPH_ENGINES``; arguments and errors as in ``open_backend``."""
    require_provider(engine, provider)
    _require_sane(graph, threads, instances)
    if engine is Engine.OPENVINO:
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(
            graph, precision=precision, threads=threads, device=provider, instances=instances
        )
    if engine is not Engine.ONNXRUNTIME:
        raise EngineError(f"{engine.value} reads no ONNX file; expected one of {[*GRAPH_ENGINES]}.")
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    if instances == 1 or threads == 1:  # a run on one thread is the calling thread's own
        return OnnxRuntimeBackend(graph, precision=precision, threads=threads, provider=provider)
    return _SeveralBackends(
        [
            OnnxRuntimeBackend(graph, precision=precision, threads=threads, provider=provider)
            for _ in range(instances)
        ]
    )


def require_computes(
    engine: Engine, precision: Precision, provider: str | None = None, *, gpu: int = 0
) -> None:
    """Check that an engine other than TensorRT supports a precision on this machine, before any work.

    Args:
        provider: See ``open_backend``.
        gpu: Number of the GPU, for an engine that runs on one.

    Raises:
        EngineError: the engine is not installed, or does not support the precision here; the message
            names the processor and the alternatives.
    """
    if engine is Engine.OPENVINO:
        from runtime.backends import openvino

        openvino.require_computes(precision, provider)
    elif engine is Engine.ONNXRUNTIME:
        from runtime.backends import onnxruntime

        onnxruntime.require_computes(precision, provider)
    elif engine is Engine.CUDA:
        from runtime.backends import onnxruntime_cuda

        onnxruntime_cuda.require_computes(precision, gpu=gpu)
    else:
        raise EngineError(f"{engine.value} reads no ONNX file; expected one of {[*GRAPH_ENGINES]}.")


def _require_sane(graph: Path, threads: int | None, instances: int) -> None:
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}; expected at least 1, or None for every physical core.")
    if instances < 1:
        raise EngineError(f"instances is {instances}; expected at least 1.")
    if not graph.is_file():
        raise EngineError(f"Graph {graph} is missing. Copy the repository again, or export again.")


class _SeveralBackends:
    """Pool of backends for one graph; each run takes an idle one."""

    def __init__(self, backends: Sequence[GraphBackend]) -> None:
        self._backends = backends
        self._idle: queue.SimpleQueue[GraphBackend] = queue.SimpleQueue()
        for backend in backends:
            self._idle.put(backend)

    @property
    def signature(self) -> Signature:
        """Signature of the graph, the same for every backend."""
        return self._backends[0].signature

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Wait for an idle backend and run the graph on it."""
        backend = self._idle.get()
        try:
            return backend.run(inputs, outputs)
        finally:
            self._idle.put(backend)

    def close(self) -> None:
        """Release all backends."""
        for backend in self._backends:
            backend.close()
