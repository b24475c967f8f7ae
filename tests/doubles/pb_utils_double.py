"""Double of ``triton_python_backend_utils``, which exists only inside a server.

Names, signatures and messages are those of Triton's python_backend (``src/pb_tensor.cc``,
``src/infer_request.cc``, ``src/pb_stub.cc``, and the README's section on business logic scripting): a tensor
in GPU memory cannot be read by NumPy, and an answer stays there unless its request prefers CPU memory.
"""

# ruff: noqa: N802 - the server's own names

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU = 0, 2


class TritonModelException(Exception):  # noqa: N818 - the server's own name
    """Exception of the python backend."""


class Tensor:
    def __init__(self, name: str, array: NDArray[Any], *, on_gpu: bool = False) -> None:
        self._name, self._array, self._on_gpu = name, array, on_gpu

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return not self._on_gpu

    def as_numpy(self) -> NDArray[Any]:
        if self._on_gpu:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array


@dataclass(frozen=True)
class PreferredMemory:
    preferred_memory_type: int
    preferred_device_id: int = 0


class TritonError:
    UNAVAILABLE, NOT_FOUND, INTERNAL, INVALID_ARG = range(4)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def code(self) -> int:
        return self._code

    def message(self) -> str:
        return self._message


class Behaviour(Enum):
    """Where a tower of the double leaves its answer."""

    GPU_UNLESS_ASKED = "as a TensorRT tower does"
    GPU_ALWAYS = "as a server that ignores the request's preference"
    FAILS = "an error"


class PbUtilsDouble(ModuleType):
    """The module, with one tower that answers with its input's row sums."""

    Tensor, PreferredMemory, TritonError = Tensor, PreferredMemory, TritonError
    TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU = TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__("triton_python_backend_utils")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.behaviour = behaviour
        self.requests: list[SimpleNamespace] = []

    def InferenceRequest(
        self,
        *,
        model_name: str,
        inputs: Sequence[Tensor],
        requested_output_names: Sequence[str],
        model_version: int = -1,
        preferred_memory: PreferredMemory | None = None,
    ) -> SimpleNamespace:
        asked_for_cpu = (
            preferred_memory is not None and preferred_memory.preferred_memory_type == TRITONSERVER_MEMORY_CPU
        )
        on_gpu = self.behaviour is Behaviour.GPU_ALWAYS or not asked_for_cpu

        def exec_() -> SimpleNamespace:
            failed = self.behaviour is Behaviour.FAILS
            sums = inputs[0].as_numpy().sum(1, keepdims=True).astype(np.float32)
            outputs = [Tensor(name, sums, on_gpu=on_gpu) for name in requested_output_names]
            return SimpleNamespace(
                has_error=lambda: failed,
                error=lambda: TritonError("the queue is full", TritonError.UNAVAILABLE),
                output_tensors=lambda: outputs,
            )

        request = SimpleNamespace(
            model=model_name, version=model_version, memory=preferred_memory, exec=exec_
        )
        self.requests.append(request)
        return request
