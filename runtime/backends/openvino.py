"""OpenVINO backend."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.backend import Signature, TensorType
from runtime.errors import EngineError
from runtime.extras import import_optional
from runtime.machine import has_vnni, is_x86, machine_in_words
from runtime.manifest import Precision

__all__ = ["OpenVinoBackend", "require_computes"]

_CPU = "CPU"

_HINTS = {Precision.FP32: "f32", Precision.FP16: "f16", Precision.BF16: "bf16", Precision.INT8: "f32"}
"""Arithmetic of unquantized nodes. Without a hint, OpenVINO computes fp32 graphs in bf16 where it can."""
_KEPT_SHAPES = 256
"""Shapes of inputs whose prepared steps OpenVINO keeps, of 5,000 by default: texts have thousands of shapes,
and each takes half a megabyte in a tower of two layers, more in a deeper one."""

_FIRST_USE = threading.Lock()


class OpenVinoBackend:
    """Compiled model with a pool of infer requests, one per concurrent thread.

    Raises:
        EngineError: see ``open_backend``.
    """

    def __init__(
        self,
        graph: Path,
        *,
        precision: Precision,
        threads: int | None,
        device: str | None,
        instances: int = 1,
    ) -> None:
        self._graph = graph
        self._model: Any = _compiled(_core(), graph, device or _CPU, precision, threads, instances)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the graph."""
        model = self._opened()
        return Signature(_types(model.inputs), _types(model.outputs))

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Run the graph and return copies of the named outputs."""
        model = self._opened()
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = model.create_infer_request()
        try:
            request.infer(dict(inputs), share_inputs=True, share_outputs=True)
            return [np.array(request.get_tensor(name).data) for name in outputs]
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise EngineError(f"OpenVINO failed on {self._graph} with {shapes}: {error}.") from error
        finally:
            self._idle.put(request)

    def close(self) -> None:
        """Release the model and its requests."""
        self._model = None
        self._idle = queue.SimpleQueue()

    def _opened(self) -> Any:
        model = self._model
        if model is None:
            raise EngineError(f"The model of {self._graph} is closed; open the Encoder again.")
        return model


def _types(values: Sequence[Any]) -> dict[str, TensorType]:
    """Convert a compiled model's tensor list to names and types."""
    return {
        value.get_any_name(): TensorType(
            np.dtype(value.get_element_type().to_dtype()).name,
            tuple(-1 if d.is_dynamic else d.get_length() for d in value.get_partial_shape()),
        )
        for value in values
    }


def _core() -> Any:
    remedy = "or pass engine='onnxruntime'."
    openvino = import_optional("openvino", "The engine 'openvino'", "babeltower[openvino]", remedy=remedy)
    with _FIRST_USE:
        # The bindings import numpy on first use; two threads doing so at once deadlock.
        openvino.Type.f32.to_dtype()
    return openvino.Core()


def _compiled(
    core: Any, graph: Path, device: str, precision: Precision, threads: int | None, instances: int
) -> Any:
    _require_capability(core, device, precision)
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "CACHE_DIR": "",
        "ENABLE_CPU_PINNING": False,  # pinned, two single-thread processes would share the first core
    }
    if instances == 1:
        properties["PERFORMANCE_HINT"] = "LATENCY"  # one run at a time takes all the threads
    else:
        properties["NUM_STREAMS"] = instances  # the weights are shared
    if device == _CPU:
        properties["CPU_RUNTIME_CACHE_CAPACITY"] = _KEPT_SHAPES
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads * instances
    try:
        return core.compile_model(str(graph), device, properties)
    except RuntimeError as error:
        raise EngineError(
            f"OpenVINO cannot open {graph} ({graph.stat().st_size} bytes): {error}. The file may be "
            "truncated or modified: copy the repository again, or export again."
        ) from error


def require_computes(precision: Precision, device: str | None = None) -> None:
    """Check that OpenVINO supports a precision here with correct results, before a graph is read.

    Raises:
        EngineError: OpenVINO or the device is missing, the device does not support the precision, or it
            is a CPU on which INT8 products saturate.
    """
    _require_capability(_core(), device or _CPU, precision)


def _require_capability(core: Any, device: str, precision: Precision) -> None:
    if device not in core.available_devices:
        raise EngineError(
            f"OpenVINO device {device!r} is not available; this machine has {core.available_devices}. "
            "Pass one of them as provider=..., or leave it out."
        )
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    where = machine_in_words() if device == _CPU else f"{device} of {machine_in_words()}"
    if precision in (Precision.FP16, Precision.BF16) and precision.value.upper() not in capabilities:
        raise EngineError(
            f"OpenVINO does not support {precision.value} on {where}; it offers {sorted(capabilities)}. "
            "Use fp32 on any engine, or int8 on engine onnxruntime."
        )
    if precision is Precision.INT8 and device == _CPU and is_x86() and has_vnni() is False:
        raise EngineError(
            f"OpenVINO's int8 is not accurate on {where}: without VNNI it sums products in 16 bits, which "
            "saturate, and it is slower than fp32. Use engine onnxruntime with int8, which is accurate on "
            "every CPU, or fp32 on either engine."
        )
