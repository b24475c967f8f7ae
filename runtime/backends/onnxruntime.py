"""ONNX Runtime backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime.backends.backend import Signature, TensorType
from runtime.backends.onnxruntime_build import import_onnxruntime
from runtime.errors import EngineError
from runtime.manifest import Precision

__all__ = ["OnnxRuntimeBackend", "require_computes", "signature_of_session"]

onnxruntime = import_onnxruntime()

_CPU = "CPUExecutionProvider"
_COMPUTES: Mapping[str, frozenset[Precision]] = {
    _CPU: frozenset({Precision.FP32, Precision.FP16, Precision.INT8}),
}
"""Precisions that a provider's matrix products keep."""


class OnnxRuntimeBackend:
    """Session on one execution provider; the graph is opened by path, so external data is memory-mapped.

    Raises:
        EngineError: see ``open_backend``.
    """

    def __init__(
        self, graph: Path, *, precision: Precision, threads: int | None, provider: str | None
    ) -> None:
        self._graph = graph
        chosen = _provider(provider, precision)
        self._session: Any = _session(graph, chosen, _options(threads))

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the graph."""
        return signature_of_session(self._opened())

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs and only the nodes they depend on."""
        session = self._opened()
        try:
            results: list[NDArray[Any]] = session.run(list(outputs), dict(inputs))
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise EngineError(f"ONNX Runtime failed on {self._graph} with {shapes}: {error}.") from error
        return results

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def _opened(self) -> Any:
        session = self._session
        if session is None:
            raise EngineError(f"The session of {self._graph} is closed; open the Encoder again.")
        return session


def signature_of_session(session: Any) -> Signature:
    """Return the inputs and outputs of an ``InferenceSession``."""
    return Signature(_types(session.get_inputs()), _types(session.get_outputs()))


def _types(values: Sequence[Any]) -> dict[str, TensorType]:
    """Convert a session's tensor list; named or unnamed symbolic dimensions become dynamic."""
    return {
        value.name: TensorType(
            _DTYPES.get(value.type, value.type), tuple(d if isinstance(d, int) else -1 for d in value.shape)
        )
        for value in values
    }


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


def require_computes(precision: Precision, provider: str | None = None) -> None:
    """Check that a provider is available and supports a precision, before a graph is read.

    Raises:
        EngineError: the provider is unavailable, or does not support the precision.
    """
    _provider(provider, precision)


def _provider(asked: str | None, precision: Precision) -> str:
    provider = asked or _CPU
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"Execution provider {provider!r} is not available; this onnxruntime has {available}. "
            f"Install the build that ships it, or pass provider={available[-1]!r}."
        )
    computes = _COMPUTES.get(provider, frozenset(Precision))
    if precision not in computes:
        where = "on a CPU" if provider == _CPU else f"with {provider}"
        raise EngineError(
            f"ONNX Runtime does not support {precision.value} {where}; it supports "
            f"{sorted(p.value for p in computes)}. Pass another engine, provider or precision."
        )
    return provider


def _options(threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # batch shapes vary, and each would keep its own memory plan
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # other processes share the cores
    return options


def _session(graph: Path, provider: str, options: Any) -> Any:
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise EngineError(
            f"ONNX Runtime cannot open {graph} ({graph.stat().st_size} bytes): {error}. The file may be "
            "truncated or modified: copy the repository again, or export again."
        ) from error
    running = session.get_providers()[0]
    if running != provider:
        raise EngineError(
            f"Execution provider {provider!r} was requested, but {running!r} would run {graph}. Install the "
            f"provider's dependencies, or pass provider={running!r}."
        )
    return session
