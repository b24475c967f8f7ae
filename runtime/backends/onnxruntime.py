"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.manifest import Precision

__all__ = ["OnnxRuntimeBackend"]

_CPU = "CPUExecutionProvider"


class OnnxRuntimeBackend:
    """A session on one execution provider; the graph is opened by path, so its external data is mapped.

    Raises:
        EngineError: see ``open_backend``.
    """

    def __init__(
        self, graph: Path, *, precision: Precision, threads: int | None, provider: str | None
    ) -> None:
        self._graph = graph
        self._session: Any = _session(graph, _provider(provider, precision), _options(threads))

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs, and nothing that they do not need."""
        session = self._session
        if session is None:
            raise EngineError(f"The session of {self._graph} is closed; open the Encoder again.")
        try:
            results: list[NDArray[Any]] = session.run(list(outputs), dict(inputs))
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise EngineError(f"ONNX Runtime failed on {self._graph} with {shapes}: {error}.") from error
        return results

    def close(self) -> None:
        """Release the session."""
        self._session = None


def _provider(asked: str | None, precision: Precision) -> str:
    provider = asked or _CPU
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"Execution provider {provider!r} is not available; this onnxruntime has {available}. "
            f"Install the build that ships it, or pass provider={available[-1]!r}."
        )
    if provider == _CPU and precision is Precision.BF16:
        raise EngineError(
            "ONNX Runtime does not compute in bf16 on a CPU. Pass engine='openvino', or another precision."
        )
    return provider


def _options(threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes change with every batch: each would keep a plan of its own
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
            f"ONNX Runtime cannot open {graph} ({graph.stat().st_size} bytes): {error}. The file may be cut "
            "short or changed: copy the repository again, or export again."
        ) from error
    running = session.get_providers()[0]
    if running != provider:
        raise EngineError(
            f"Execution provider {provider!r} was asked for, but {running!r} would run {graph}. Install what "
            f"the provider needs (driver, CUDA, cuDNN), or pass provider={running!r}."
        )
    return session
