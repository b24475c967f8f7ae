"""ONNX Runtime on an NVIDIA GPU: graphs fused for CUDA, run in a few shapes as captured CUDA graphs.

Batches are padded to a bucket (``runtime/preprocessing/buckets.py``). The first run of a bucket captures a
CUDA graph; later ones replay it. Inputs and outputs pass through page-locked memory on a stream of their own,
so that one caller's copies overlap another's computation. All runs, captures included, are on one thread of
the GPU (``runtime/backends/gpu_thread.py``).

Nothing runs on the processor: a graph with a node that has no CUDA kernel is refused when it is opened.

A text tower that packs its texts runs any shape as it is, and is never captured: how many tokens a run has is
known to the processor only once the GPU has counted them.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.backend import Signature, TensorType
from runtime.backends.cuda import CudaDevice, open_device
from runtime.backends.gpu_thread import GpuThread
from runtime.backends.onnxruntime import signature_of_session
from runtime.backends.onnxruntime_build import CUDA_PROVIDER, preload, require_cuda_build
from runtime.backends.padding import padded_to_bucket
from runtime.errors import EngineError, InputError
from runtime.manifest import Precision
from runtime.preprocessing.buckets import (
    CONTEXT_LENGTH,
    EXACT_ROWS,
    PACKED_TEXT,
    Buckets,
    image_buckets,
    text_buckets,
)

__all__ = ["OnnxRuntimeCudaBackend", "require_computes"]

_COMPUTES = frozenset({Precision.FP32, Precision.FP16, Precision.BF16})
_NO_GRAPH = -1
"""ONNX Runtime's number of a run that neither captures nor replays."""

_N_LANES = 2
"""Batches under way at once: one computes while another is copied."""

Shape = tuple[int, int]


def require_computes(precision: Precision, *, gpu: int = 0) -> None:
    """Check that ONNX Runtime can compute in a precision on a GPU of this machine.

    Raises:
        EngineError: it supports no such precision on CUDA, or there is no GPU.
        MissingPackageError: the installed build has no CUDA.
    """
    _require_supported(precision)
    require_cuda_build()
    device = open_device(gpu)
    device.close()
    _require_products(device, precision)


class OnnxRuntimeCudaBackend:
    """Session on one GPU; runs from several threads are copied at once and computed one after the other.

    Raises:
        EngineError: see ``open_backend``; also if a node would run on the processor.
    """

    def __init__(self, graph: Path, *, precision: Precision, gpu: int = 0, cuda_graphs: bool = True) -> None:
        _require_supported(precision)
        module = preload()
        self._graph = graph
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._thread = GpuThread(gpu)
        try:
            self._thread.call(partial(self._open, module, precision, gpu, cuda_graphs=cuda_graphs))
        except BaseException:
            self.close()
            raise

    def _open(self, module: Any, precision: Precision, gpu: int, *, cuda_graphs: bool) -> None:
        with contextlib.ExitStack() as stack:
            device = open_device(gpu)
            stack.callback(device.close)
            _require_products(device, precision)
            session = _session(module, self._graph, device, cuda_graphs=cuda_graphs)
            if cuda_graphs and _packs_text(session):  # a graph says so only once it is opened
                cuda_graphs, session = False, None
                session = _session(module, self._graph, device, cuda_graphs=False)
            self.signature: Signature = signature_of_session(session)
            self.buckets: Buckets = _buckets(session, self.signature, self._graph)
            self._running = _Running(
                module, session, device, self._thread, self.signature, self.buckets, cuda_graphs=cuda_graphs
            )
            stack.pop_all()

    @property
    def n_captured(self) -> int:
        """Number of CUDA graphs captured so far; at most one per bucket, and none of packed texts."""
        return len(self._opened().graph_ids)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs; a batch larger than every bucket is run in parts."""
        return self._run(inputs, outputs, with_events=False)[0]

    def run_with_events(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> tuple[list[NDArray[Any]], float]:
        """Run, and return also the GPU's time in milliseconds, from the first kernel to the last."""
        return self._run(inputs, outputs, with_events=True)

    def close(self) -> None:
        """Release the session, its memory and its streams."""
        with self._lock:
            running, self._running = self._running, None
            if running is not None:
                running.close()
            self._thread.close()

    def _run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, with_events: bool
    ) -> tuple[list[NDArray[Any]], float]:
        self._require_known(inputs, outputs)
        running = self._opened()
        parts, total = [], 0.0
        for part in self._parts(inputs):
            results, ms = running.run(part, outputs, with_events=with_events)
            parts.append(results)
            total += ms
        if len(parts) == 1:
            return parts[0], total
        return [np.concatenate(column) for column in zip(*parts, strict=True)], total

    def _parts(self, inputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        n_rows, length = _shape_of(inputs)
        try:
            most = self.buckets.most_rows(length)
        except InputError as error:
            raise EngineError(f"{self._graph}: {error} Shorten the text.") from error
        for at in range(0, n_rows, most):
            yield {name: array[at : at + most] for name, array in inputs.items()}

    def _require_known(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> None:
        signature = self.signature
        if unknown := sorted(set(outputs) - signature.outputs.keys()):
            raise EngineError(f"The graph has no output {unknown[0]!r}; it has {sorted(signature.outputs)}.")
        for name, expected in signature.inputs.items():
            array = inputs.get(name)
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            if array is None or str(array.dtype) != expected.dtype or not _fits(array.shape, expected.shape):
                raise EngineError(
                    f"Input {name!r} of {self._graph} is {found}; expected {expected.dtype}"
                    f"{list(expected.shape)}, where -1 is any size."
                )
        if len({len(array) for array in inputs.values()}) != 1 or not len(next(iter(inputs.values()))):
            shapes = {name: list(array.shape) for name, array in inputs.items()}
            raise EngineError(
                f"The inputs of {self._graph} are {shapes}; expected equal numbers of rows, 1 or more."
            )

    def _opened(self) -> _Running:
        running = self._running
        if running is None:
            raise EngineError(f"The session of {self._graph} is closed; open the Encoder again.")
        return running


@dataclass(slots=True)
class _Lane:
    """Stream and memory of one batch under way: page-locked on the host, and staged on the device."""

    stream: int
    copied: Any
    computed: Any
    host: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    staged: dict[str, int] = field(default_factory=dict)


class _Running:
    """Session with the memory that its CUDA graphs read and write."""

    def __init__(
        self,
        module: Any,
        session: Any,
        device: CudaDevice,
        thread: GpuThread,
        signature: Signature,
        buckets: Buckets,
        *,
        cuda_graphs: bool,
    ) -> None:
        self._module, self._session, self._device = module, session, device
        self._thread = thread
        self._signature, self._buckets, self._cuda_graphs = signature, buckets, cuda_graphs
        self.graph_ids: dict[Shape, int] = {}
        self._bindings: dict[Shape, Any] = {}
        self._fixed: dict[str, int] = {}
        self._lanes: list[_Lane] = []
        self._idle: queue.SimpleQueue[_Lane | None] = queue.SimpleQueue()
        tensors = {**signature.inputs, **signature.outputs}
        self._bytes = {
            name: max(_n_bytes(_padded_shape(spec, shape), spec.dtype) for shape in _largest(buckets))
            for name, spec in tensors.items()
        }
        try:
            for name, n_bytes in self._bytes.items():
                self._fixed[name] = device.allocate(n_bytes)
            for _ in range(_N_LANES):
                self._lanes.append(_Lane(device.new_stream(), device.event(), device.event()))
        except BaseException:
            self._release()
            raise
        for lane in self._lanes:
            self._idle.put(lane)

    def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, with_events: bool
    ) -> tuple[list[NDArray[Any]], float]:
        """Run one batch in its bucket; return outputs and event-timed ms (or 0.0)."""
        device = self._device
        device.use()
        padded, n_rows = padded_to_bucket(inputs, self._buckets)
        shape = _shape_of(padded)
        lane = self._idle.get()
        if lane is None:
            self._idle.put(None)  # for the next one who waits
            raise EngineError("The session was closed while a batch waited; open the Encoder again.")
        try:
            for name, array in padded.items():
                held = self._host(lane, name, array.nbytes)
                np.copyto(held.view(array.dtype).reshape(array.shape), array)
                device.copy_in(self._staged(lane, name), held, stream=lane.stream)
            device.mark(lane.copied, stream=lane.stream)
            ms = self._thread.call(
                partial(self._computed, lane, padded, outputs, shape, with_events=with_events)
            )
            device.follow(lane.computed, stream=lane.stream)
            found = []
            for name in outputs:
                spec = self._signature.outputs[name]
                full = _padded_shape(spec, shape)
                held = self._host(lane, name, _n_bytes(full, spec.dtype))
                device.copy_into(held, self._staged(lane, name), stream=lane.stream)
                found.append((held, full, spec.dtype))
            device.wait(stream=lane.stream)
            return [held.view(dtype).reshape(full)[:n_rows].copy() for held, full, dtype in found], ms
        except BaseException:
            with contextlib.suppress(EngineError):  # no copy may be under way when the lane is used again
                self._thread.call(device.wait)  # a stream that is being captured must not be waited for
            with contextlib.suppress(EngineError):
                device.wait(stream=lane.stream)
            raise
        finally:
            self._idle.put(lane)

    def _computed(
        self,
        lane: _Lane,
        padded: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        shape: Shape,
        *,
        with_events: bool,
    ) -> float:
        """Queue the batch's computation behind its copy, and a copy of its results into the lane.

        Called on the GPU's thread alone, as is ``_release``.
        """
        device = self._device
        device.follow(lane.copied)
        for name, array in padded.items():
            device.copy_within(self._fixed[name], lane.staged[name], array.nbytes)
        is_new = shape not in self._bindings
        if is_new:  # runs once as it is and once while captured; neither is timed
            self._launch(shape)
        events = [device.event(), device.event()] if with_events else []
        if events:
            device.mark(events[0])
        if events or not is_new:
            self._launch(shape)
        if events:
            device.mark(events[1])
        for name in outputs:
            spec = self._signature.outputs[name]
            n_bytes = _n_bytes(_padded_shape(spec, shape), spec.dtype)
            device.copy_within(self._staged(lane, name), self._fixed[name], n_bytes)
        device.mark(lane.computed)
        if not events:
            return 0.0
        device.wait()
        return device.milliseconds(*events)

    def _launch(self, shape: Shape) -> None:
        """Queue one run; the first one of a bucket captures its CUDA graph, an exact shape has none."""
        binding = self._bindings.get(shape)
        if binding is None:
            binding = self._bindings[shape] = self._binding(shape)
        number = _NO_GRAPH
        if self._cuda_graphs and not self._buckets.is_exact(*shape):
            number = self.graph_ids.setdefault(shape, len(self.graph_ids) + 1)
        options = self._module.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            self._bindings.pop(shape, None)  # the next run is a shape's first again, and not timed
            raise EngineError(
                f"ONNX Runtime failed on GPU {self._device.index} with a batch of {shape[0]} rows × "
                f"{shape[1]}: {error}. If memory is short, free some, or embed fewer rows at once."
            ) from error

    def _binding(self, shape: Shape) -> Any:
        binding = self._session.io_binding()
        for tensors, bind in (
            (self._signature.inputs, binding.bind_input),
            (self._signature.outputs, binding.bind_output),
        ):
            for name, spec in tensors.items():
                size = _padded_shape(spec, shape)
                bind(name, "cuda", self._device.index, np.dtype(spec.dtype).type, size, self._fixed[name])
        return binding

    def close(self) -> None:
        """Release everything, once the runs under way have ended; those that wait are refused."""
        for _ in self._lanes:
            self._idle.get()
        self._idle.put(None)
        self._thread.call(self._release)
        self._thread.call(self._device.close)

    def _release(self) -> None:
        device = self._device
        self._bindings.clear()
        self._session = None
        for lane in self._lanes:
            for held in lane.host.values():
                device.free_pinned(held)
            for address in lane.staged.values():
                device.free(address)
            device.drop_event(lane.copied)
            device.drop_event(lane.computed)
            device.drop_stream(lane.stream)
        for address in self._fixed.values():
            device.free(address)

    def _host(self, lane: _Lane, name: str, n_bytes: int) -> NDArray[np.uint8]:
        """Return the lane's page-locked memory for a tensor, grown to the largest batch so far."""
        held = lane.host.get(name)
        if held is None or len(held) < n_bytes:
            if held is not None:
                self._device.free_pinned(lane.host.pop(name))
            lane.host[name] = held = self._device.pinned(n_bytes)
        return held[:n_bytes]

    def _staged(self, lane: _Lane, name: str) -> int:
        if name not in lane.staged:
            lane.staged[name] = self._device.allocate(self._bytes[name])
        return lane.staged[name]


def _require_supported(precision: Precision) -> None:
    if precision not in _COMPUTES:
        raise EngineError(
            f"ONNX Runtime does not support {precision.value} on CUDA; it supports "
            f"{sorted(p.value for p in _COMPUTES)}. Pass another precision, or engine='tensorrt'."
        )


def _require_products(device: CudaDevice, precision: Precision) -> None:
    if not device.facts.multiplies_in(precision):
        name, capability = device.facts.name, device.facts.compute_capability
        raise EngineError(
            f"GPU {device.index} ({name}, compute capability {capability}) has no products in "
            f"{precision.value}. Pass precision='fp16'."
        )


def _session(module: Any, graph: Path, device: CudaDevice, *, cuda_graphs: bool) -> Any:
    options = module.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream),
        "use_tf32": "0",  # products of FP32 would be rounded to 10 bits
        "enable_cuda_graph": "1" if cuda_graphs else "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    try:
        session = module.InferenceSession(str(graph), options, providers=[(CUDA_PROVIDER, provider)])
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise EngineError(
            f"ONNX Runtime cannot open {graph} on GPU {device.index} ({device.facts.name}): {error}. If a "
            "node has no CUDA kernel, export the checkpoint again with --engine cuda, or install a newer "
            "onnxruntime-gpu."
        ) from error
    running = session.get_providers()
    if running[:1] != [CUDA_PROVIDER]:
        raise EngineError(
            f"{CUDA_PROVIDER} was requested, but {running[0]!r} would run {graph}. Check the GPU's driver "
            "with nvidia-smi."
        )
    return session


def _buckets(session: Any, signature: Signature, graph: Path) -> Buckets:
    if "pixels" in signature.inputs:
        return image_buckets()
    length = _metadata(session).get(CONTEXT_LENGTH, "")
    if not length.isdecimal() or int(length) < 1:
        raise EngineError(f"{graph} does not state its context length. Export the checkpoint again.")
    return text_buckets(int(length), exact_rows=EXACT_ROWS, packed=_packs_text(session))


def _packs_text(session: Any) -> bool:
    return PACKED_TEXT in _metadata(session)


def _metadata(session: Any) -> Mapping[str, str]:
    found: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    return found


def _largest(buckets: Buckets) -> tuple[Shape, ...]:
    """Return the shapes that bound the memory of all others: each bucket, and the largest exact runs."""
    exact = ((1, buckets.max_tokens),) if buckets.packed or buckets.exact_rows is not None else ()
    return (*buckets.shapes, *exact, (buckets.rows[-1], 1))


def _shape_of(inputs: Mapping[str, NDArray[Any]]) -> Shape:
    """Return a batch's rows and tokens; images have one."""
    first = next(iter(inputs.values()))
    return len(first), first.shape[1] if first.ndim == 2 else 1


def _padded_shape(spec: TensorType, shape: Shape) -> tuple[int, ...]:
    """Return a tensor's shape in a bucket: its first dynamic size is the rows, a second one the tokens."""
    sizes = iter(shape)
    return tuple(next(sizes) if size < 0 else size for size in spec.shape)


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(found) == len(expected) and all(e in (-1, f) for f, e in zip(found, expected, strict=True))


def _n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
