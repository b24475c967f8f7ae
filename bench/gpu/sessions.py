"""Exported towers in ONNX Runtime: on bound device memory with CUDA graphs, and from NumPy to NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bench.gpu.clocks import METRICS, Contender
from bench.gpu.forms import TimedForm
from runtime.backends import open_backend
from runtime.device import Device
from runtime.manifest import Engine

__all__ = ["TimedSession"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class TimedSession:
    """Session of one graph; each shape has its own device memory and CUDA graph.

    What is timed from NumPy to NumPy is the product's backend, in a session of its own.
    """

    def __init__(self, graph: Path, form: TimedForm, *, stream: int | None) -> None:
        """Open a session.

        Args:
            graph: ONNX file.
            form: Form of the graph.
            stream: CUDA stream to run on; the processor if it is None.
        """
        self._device = "cpu" if stream is None else "cuda"
        self._form = form
        self._capture = form.capture and stream is not None
        self._n_shapes = 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        found = (
            [(_CPU, {})]
            if stream is None
            else [(_CUDA, _cuda_options(stream, self._capture, form.attention))]
        )
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=found)
        if (running := self._session.get_providers()[0]) != found[0][0]:
            raise RuntimeError(f"{found[0][0]} was requested, but {running} would run {graph.name}.")
        self.engine = (Engine.ONNXRUNTIME if stream is None else Engine.CUDA).value
        self._backend: Any = None
        if form.in_full:
            device = None if stream is None else Device(0)
            self._backend = open_backend(Engine(self.engine), graph, precision=form.precision, device=device)

    def contender(self, inputs: Mapping[str, NDArray[Any]]) -> Contender:
        """Return the runs of one shape; with CUDA graphs, the first launches capture one."""
        self._n_shapes += 1
        bound = self._bind(inputs)
        queued = self._options()
        session = self._session

        def launch() -> None:
            session.run_with_iobinding(bound, queued)

        def from_host() -> NDArray[Any]:
            if self.is_in_full:
                return self.run_from_host(inputs)
            launch()
            bound.synchronize_outputs()
            return np.asarray(bound.get_outputs()[0].numpy())

        return Contender(
            self._form.by,
            self.engine,
            self._form.precision.value,
            launch,
            from_host,
            {
                "cuda_graph": self._capture,
                "projections": self._form.projections.value,
                "packed": self._form.packed,
            },
            METRICS if self._form.in_full else METRICS[:1],
        )

    @property
    def is_in_full(self) -> bool:
        """Whether the product's backend is open beside the session."""
        return self._backend is not None

    def run_from_host(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Compute the first output by the product's backend."""
        (vectors,) = self._backend.run(inputs, [self._session.get_outputs()[0].name])
        return np.asarray(vectors)

    def _options(self) -> Any:
        options = onnxruntime.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", str(self._n_shapes))
        if self._device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind(self, inputs: Mapping[str, NDArray[Any]]) -> Any:
        value = onnxruntime.OrtValue
        bound = self._session.io_binding()
        held = {
            name: value.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
            for name, array in inputs.items()
        }
        for name, array in held.items():
            bound.bind_ortvalue_input(name, array)
        output = self._session.get_outputs()[0]
        shape = [len(next(iter(inputs.values()))), int(output.shape[1])]
        bound.bind_ortvalue_output(
            output.name, value.ortvalue_from_shape_and_type(shape, np.float32, self._device, 0)
        )
        return bound


def _cuda_options(stream: int, capture: bool, attention: str) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(capture)),
        **({"sdpa_kernel": attention} if attention else {}),
    }
