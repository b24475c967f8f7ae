"""CUDA calls for running a graph: memory, copies, streams, events and captured graphs.

They go through NVIDIA's ``cuda-bindings``, whose functions return ``(error, *results)``.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.plans import DeviceFacts
from runtime.errors import EngineError
from runtime.extras import import_optional

__all__ = ["CudaDevice", "gpu_facts", "gpu_in_words", "gpu_record", "open_device"]

_NON_BLOCKING = 1
"""Flag of a stream that does not wait for the default stream; our own wait for each other by events."""


def open_device(index: int = 0) -> CudaDevice:
    """Open a GPU and create a stream on it.

    Raises:
        EngineError: the bindings are not installed, or there is no such GPU.
    """
    api = import_optional(
        "cuda.bindings.runtime", "A GPU", "babeltower[gpu]", remedy="or pass engine='onnxruntime'."
    )
    status, n_devices = api.cudaGetDeviceCount()
    if int(status) != 0 or index >= n_devices:
        raise EngineError(
            f"GPU {index} is not available: CUDA reports {_reason(api, status)!r} and {n_devices or 0} "
            "GPUs. Run this on a machine with an NVIDIA GPU and driver, or pass engine='onnxruntime'."
        )
    return CudaDevice(api, index)


def gpu_facts(index: int = 0) -> DeviceFacts:
    """Return a GPU's facts; errors as of ``open_device``."""
    with contextlib.closing(open_device(index)) as device:
        return device.facts


def gpu_record(index: int = 0) -> dict[str, str]:
    """Return what computes on a GPU, for records of measurements; errors as of ``open_device``.

    Returns:
        ``gpu`` (its name), ``compute_capability``, and the CUDA versions of runtime and ``driver``.
    """
    with contextlib.closing(open_device(index)) as device:
        return {
            "gpu": device.facts.name,
            "compute_capability": device.facts.compute_capability,
            "cuda": device.facts.cuda,
            "driver": device.driver,
        }


def gpu_in_words(facts: Mapping[str, Any]) -> str:
    """Describe a ``gpu_record`` in a message."""
    return (
        f"{facts['gpu']} (compute capability {facts['compute_capability']}, CUDA {facts['cuda']}, driver for "
        f"CUDA {facts['driver']})"
    )


class CudaDevice:
    """One GPU and its main stream; every call raises ``EngineError`` if CUDA reports an error.

    Work is queued on the main stream unless another one is named.
    """

    def __init__(self, api: Any, index: int) -> None:
        self._api = api
        self.index = index
        self.use()
        self.facts = self._facts()
        self.stream = self.new_stream()

    def allocate(self, n_bytes: int) -> int:
        """Allocate device memory and return its address."""
        return int(self._call("cudaMalloc", max(1, n_bytes)))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Allocate page-locked host memory, from which copies need no help of the processor.

        It is released with ``free_pinned``, not with the array.
        """
        address = int(self._call("cudaHostAlloc", max(1, n_bytes), 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, n_bytes)).from_address(address))

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Release memory from ``pinned``; the array must not be used afterwards."""
        self._call("cudaFreeHost", memory.ctypes.data)

    def copy_in(self, address: int, array: NDArray[Any], *, stream: int | None = None) -> None:
        """Queue a copy to the device; the array must be contiguous and stay alive until ``wait``."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Queue a copy from the device into a new array, complete after ``wait``."""
        array: NDArray[Any] = np.empty(shape, dtype)
        self.copy_into(array, address)
        return array

    def copy_into(self, array: NDArray[Any], address: int, *, stream: int | None = None) -> None:
        """Queue a copy from the device into an array, complete after ``wait``."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, address, array.nbytes, kind, stream)

    def copy_within(self, to: int, source: int, n_bytes: int) -> None:
        """Queue a copy from one address of the device to another."""
        self._copy(to, source, n_bytes, self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice, None)

    def _copy(self, to: int, source: int, n_bytes: int, kind: Any, stream: int | None) -> None:
        self._call("cudaMemcpyAsync", to, source, n_bytes, kind, self.stream if stream is None else stream)

    def new_stream(self) -> int:
        """Create a stream beside the main one; released with ``drop_stream``."""
        return int(self._call("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def drop_stream(self, stream: int) -> None:
        """Release a stream from ``new_stream``."""
        self._call("cudaStreamDestroy", stream)

    def wait(self, *, stream: int | None = None) -> None:
        """Wait until all work queued on a stream is done."""
        self._call("cudaStreamSynchronize", self.stream if stream is None else stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture the calls that ``work`` queues as an executable graph, without running them."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self._api.cudaStreamEndCapture(self.stream)  # makes the stream usable again; the graph is dropped
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def drop(self, graph: Any) -> None:
        """Release a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def event(self) -> Any:
        """Create an event that can be recorded in the stream."""
        return self._call("cudaEventCreate")

    def mark(self, event: Any, *, stream: int | None = None) -> None:
        """Record an event in a stream."""
        self._call("cudaEventRecord", event, self.stream if stream is None else stream)

    def follow(self, event: Any, *, stream: int | None = None) -> None:
        """Let a stream's later work start only after an event."""
        self._call("cudaStreamWaitEvent", self.stream if stream is None else stream, event, 0)

    def drop_event(self, event: Any) -> None:
        """Release an event."""
        self._call("cudaEventDestroy", event)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two completed events, and release the events."""
        elapsed = float(self._call("cudaEventElapsedTime", start, end))
        for event in (start, end):
            self._call("cudaEventDestroy", event)
        return elapsed

    def close(self) -> None:
        """Release the stream."""
        self._call("cudaStreamDestroy", self.stream)

    def use(self) -> None:
        """Make this the calling thread's GPU, and let the thread allocate while another one captures.

        Without the latter, an allocation fails during any capture that ONNX Runtime makes, and spoils it.
        """
        self._call("cudaSetDevice", self.index)
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaThreadExchangeStreamCaptureMode", mode)

    def _facts(self) -> DeviceFacts:
        attribute = self._api.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.index)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.index)
        name = self._call("cudaGetDeviceProperties", self.index).name
        return DeviceFacts(
            name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
            compute_capability=f"{major}.{minor}",
            cuda=_version(self._call("cudaRuntimeGetVersion")),
        )

    @property
    def driver(self) -> str:
        """CUDA version that the driver supports, such as ``"13.0"``."""
        return _version(self._call("cudaDriverGetVersion"))

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, function)(*arguments)
        if int(status) != 0:
            raise EngineError(
                f"{function} failed on GPU {self.index}: {_reason(self._api, status)}. Free GPU memory, or "
                "restart the process."
            )
        return results[0] if results else None


def _version(number: Any) -> str:
    """Return CUDA's version number, 1,000 × major + 10 × minor, as ``"13.0"``."""
    return f"{int(number) // 1000}.{int(number) % 1000 // 10}"


def _reason(api: Any, status: Any) -> str:
    _, text = api.cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)
