"""TensorRT backend: runs a plan on the GPU it was built for.

Batches are padded to a few shapes (``buckets_of_profile``), and each shape is captured as a CUDA graph at
its first run. Written against the part of TensorRT's documented Python API that 10.x and 11.x share, and
tested with stand-ins for the library and the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda import CudaDevice, open_device
from runtime.backends.padding import buckets_of_profile, padded_to_bucket
from runtime.backends.plan_checks import profile_for, require_fit, sizes_of_inputs
from runtime.backends.plans import PlanManifest
from runtime.errors import EngineError
from runtime.extras import import_optional
from runtime.manifest import Precision

__all__ = ["MAX_CAPTURED", "TensorRtBackend"]

MAX_CAPTURED = 256
"""Number of shapes whose CUDA graphs are kept; the least recently used is dropped first. Above the 130 shapes
of a text tower of 512 tokens and 512 rows."""

Shape = tuple[tuple[str, int], ...]


class TensorRtBackend:
    """A plan on its own CUDA stream; runs are serialized.

    Raises:
        EngineError: see ``open_backend``; also if the plan is for another TensorRT, GPU or precision.
        ManifestError: the plan's manifest is missing, or is another plan's.
    """

    def __init__(self, plan: Path, *, precision: Precision, gpu: int = 0) -> None:
        self._lock = threading.Lock()
        self._plan, self._manifest = plan, PlanManifest.read(plan)
        self._buckets = [buckets_of_profile(profile) for profile in self._manifest.profiles]
        library = _library()
        with contextlib.ExitStack() as stack:
            device = open_device(gpu)
            stack.callback(device.close)
            require_fit(self._manifest, precision, str(library.__version__), device.facts)
            self._session: _Session | None = _Session(library, device, plan, self._manifest)
            stack.pop_all()

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Run the plan and return the named outputs."""
        return self._run(inputs, outputs, with_events=False)[0]

    def run_with_events(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> tuple[list[NDArray[Any]], float]:
        """Run the plan; return the outputs and the GPU's compute time in milliseconds.

        The time is that of the captured graph alone: without copies, and without the capture of a new shape.
        """
        return self._run(inputs, outputs, with_events=True)

    def _run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, with_events: bool
    ) -> tuple[list[NDArray[Any]], float]:
        manifest = self._manifest
        if unknown := sorted(set(outputs) - manifest.outputs.keys()):
            raise EngineError(f"The plan has no output {unknown[0]!r}; it has {sorted(manifest.outputs)}.")
        index = profile_for(manifest.profiles, sizes_of_inputs(manifest.inputs, inputs))
        padded, n_rows = padded_to_bucket(inputs, self._buckets[index])
        with self._lock:
            if self._session is None:
                raise EngineError(f"The plan {self._plan} is closed; open the Encoder again.")
            return self._session.run(index, padded, n_rows, outputs, with_events=with_events)

    def close(self) -> None:
        """Release the plan and its memory."""
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                session.close()


@dataclass(frozen=True, slots=True)
class _Captured:
    """A shape's CUDA graph and the context it was captured from, which must not be used otherwise."""

    context: Any
    graph: Any


class _Session:
    """Loaded plan: buffers for each profile in use, a context and a graph for each shape in use.

    A captured graph holds its context's state and every address, so it has its own context. The contexts
    share one scratch buffer, since their work is queued on one stream.
    """

    def __init__(self, library: Any, device: CudaDevice, plan: Path, manifest: PlanManifest) -> None:
        self._library, self._device, self._manifest = library, device, manifest
        self._log = _log(library)
        self._runtime = library.Runtime(self._log)
        if manifest.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan contains its own runtime
        self._engine: Any = _engine(self._runtime, plan, manifest, self._log)
        if streamable_bytes := int(self._engine.streamable_weights_size):
            # Keep on the GPU the weights that fit; TensorRT's default is all of them.
            budget = int(self._engine.get_weight_streaming_automatic_budget())
            self._engine.weight_streaming_budget_v2 = min(budget, streamable_bytes)
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        self._scratch = device.allocate(self._scratch_bytes)
        self._buffers: dict[int, dict[str, int]] = {}
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()

    def run(
        self,
        index: int,
        inputs: Mapping[str, NDArray[Any]],
        n_rows: int,
        outputs: Sequence[str],
        *,
        with_events: bool,
    ) -> tuple[list[NDArray[Any]], float]:
        """Copy in, compute in profile ``index``, copy ``n_rows`` rows out.

        Returns:
            The outputs, and the graph's milliseconds between two events (0.0 without ``with_events``).
        """
        device, specs = self._device, self._manifest.outputs
        device.use()
        buffers = self._buffers_of(index)
        sizes = sizes_of_inputs(self._manifest.inputs, inputs)
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in held.items():
            device.copy_in(buffers[name], array)
        graph = self._graph_of(index, sizes)
        events = [device.event(), device.event()] if with_events else []
        if events:
            device.mark(events[0])
        device.launch(graph)
        if events:
            device.mark(events[1])
        kept = {**sizes, "batch": n_rows}
        found = [
            device.copy_out(buffers[name], specs[name].shape(kept), specs[name].dtype) for name in outputs
        ]
        device.wait()
        return found, device.milliseconds(*events) if events else 0.0

    def close(self) -> None:
        """Release graphs, contexts, the plan, memory and finally the stream."""
        device = self._device
        device.use()
        for captured in self._captured.values():
            device.drop(captured.graph)
        self._captured.clear()
        self._engine = self._runtime = None
        for buffers in self._buffers.values():
            for address in buffers.values():
                device.free(address)
        device.free(self._scratch)
        device.close()

    def _graph_of(self, index: int, sizes: Mapping[str, int]) -> Any:
        """Return the graph of a shape, captured at its first run."""
        shape: Shape = tuple(sorted(sizes.items()))
        if shape not in self._captured:
            self._captured[shape] = self._capture(index, sizes)
            if len(self._captured) > MAX_CAPTURED:
                _, dropped = self._captured.popitem(last=False)
                self._device.wait()
                self._device.drop(dropped.graph)
        self._captured.move_to_end(shape)
        return self._captured[shape].graph

    def _capture(self, index: int, sizes: Mapping[str, int]) -> _Captured:
        """Run once uncaptured, so that TensorRT prepares the new shape, then capture the same run."""
        context = self._context(index)
        for name, spec in self._manifest.inputs.items():
            if not context.set_input_shape(name, spec.shape(sizes)):
                raise EngineError(
                    f"TensorRT rejects {name!r} of shape {spec.shape(sizes)}: {self._log.last()}"
                )
        self._execute(context)
        return _Captured(context, self._device.capture(lambda: self._execute(context)))

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise EngineError(f"TensorRT failed: {self._log.last()}")

    def _context(self, index: int) -> Any:
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(index, self._device.stream):
            raise EngineError(f"TensorRT cannot create a context for profile {index}: {self._log.last()}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        for name, address in self._buffers_of(index).items():
            context.set_tensor_address(name, address)
        return context

    def _buffers_of(self, index: int) -> dict[str, int]:
        """Return device buffers for a profile's largest shape, allocated on first use."""
        if index not in self._buffers:
            largest = self._manifest.profiles[index].largest
            self._buffers[index] = {
                name: self._device.allocate(spec.n_bytes(largest))
                for name, spec in {**self._manifest.inputs, **self._manifest.outputs}.items()
            }
        return self._buffers[index]


def _library() -> Any:
    remedy = "or pass engine='onnxruntime'."
    return import_optional("tensorrt", "The engine 'tensorrt'", "babeltower[tensorrt]", remedy=remedy)


def _log(library: Any) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]
        """Logger that keeps the last error, which the library's calls do not return."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._last = "no reason was logged."

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self._last = message

        def last(self) -> str:
            return self._last

    return Log()


def _engine(runtime: Any, plan: Path, manifest: PlanManifest, log: Any) -> Any:
    """Load the plan and check it against its manifest."""
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(f"TensorRT cannot load {plan}: {log.last()} Build it from {manifest.onnx} again.")
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = manifest.inputs.keys() | manifest.outputs.keys()
    if names != expected or engine.num_optimization_profiles != len(manifest.profiles):
        raise EngineError(
            f"{plan} has tensors {sorted(names)} and {engine.num_optimization_profiles} profiles; its "
            f"manifest lists {sorted(expected)} and {len(manifest.profiles)}. Build it from {manifest.onnx} "
            "again."
        )
    return engine
