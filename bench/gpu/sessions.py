"""Exported towers in ONNX Runtime: on bound device memory with CUDA graphs, and from NumPy to NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bench.gpu.clocks import Contender

__all__ = ["TimedSession"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class TimedSession:
    """Session of one graph in one precision; each shape has its own device memory and CUDA graph."""

    def __init__(self, graph: Path, *, precision: str, stream: int | None, capture: bool) -> None:
        """Open a session.

        Args:
            graph: ONNX file.
            precision: Name for the records.
            stream: CUDA stream to run on; the processor if it is None.
            capture: Capture a CUDA graph per shape.
        """
        self._device = "cpu" if stream is None else "cuda"
        self._precision, self._capture = precision, capture
        self._n_shapes = 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        found = [(_CPU, {})] if stream is None else [(_CUDA, _cuda_options(stream, capture))]
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=found)
        if (running := self._session.get_providers()[0]) != found[0][0]:
            raise RuntimeError(f"{found[0][0]} was requested, but {running} would run {graph.name}.")

    def contender(self, inputs: Mapping[str, NDArray[Any]], *, by: str = "babeltower") -> Contender:
        """Return the runs of one shape; with CUDA graphs, the first launches capture one."""
        self._n_shapes += 1
        bound, held = self._bind(inputs)
        queued, waiting = self._options(wait=False), self._options(wait=True)
        session = self._session

        def launch() -> None:
            session.run_with_iobinding(bound, queued)

        def from_host() -> NDArray[Any]:
            for name, array in inputs.items():
                held[name].update_inplace(array)
            session.run_with_iobinding(bound, waiting)
            result: NDArray[Any] = bound.get_outputs()[0].numpy()
            return result

        detail = {"cuda_graph": self._capture}
        return Contender(by, "onnxruntime", self._precision, launch, from_host, detail)

    def _options(self, *, wait: bool) -> Any:
        options = onnxruntime.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", str(self._n_shapes))
        if self._device == "cuda" and not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Any, dict[str, Any]]:
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
        return bound, held


def _cuda_options(stream: int, capture: bool) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream),
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": str(int(capture)),
    }
