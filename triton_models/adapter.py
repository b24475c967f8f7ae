"""Adapter of Triton's Python objects; ``triton_python_backend_utils`` exists only inside a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from triton_models.answers import REASONS, AnswerVectors, Code, Failure, TowerError, TowerRun
from triton_models.calls import ConcurrentCalls
from triton_models.counters import DESCRIPTIONS, Counters, LabelledName
from triton_models.gate import STOPPING
from triton_models.spec import TowerCall

__all__ = [
    "TritonTower",
    "counters_of_model",
    "parameters_of_model",
    "response_from_answer",
    "tensors_of_request",
    "version_folder",
]


_PASSING = ("Server not ready", "Server is stopping", "is not healthy", STOPPING.message)
"""Messages of failures that pass by themselves, whatever their code is."""


class TritonTower:
    """Client of a tower on the same server (business logic scripting)."""

    def __init__(self, tower: TowerCall) -> None:
        self._tower = tower
        # By default, a tower on a GPU leaves its answer in GPU memory, where NumPy cannot read it.
        self._memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        self._calls: ConcurrentCalls[Any, Any] = ConcurrentCalls(lambda request: request.exec())

    def __call__(self, runs: Sequence[TowerRun]) -> list[list[NDArray[Any]] | TowerError]:
        """Make all calls together; one fails if the tower is not loaded, its queue is full, or it fails."""
        responses = self._calls.each([self._request(run) for run in runs])
        return [self._outcome(response, run) for response, run in zip(responses, runs, strict=True)]

    def close(self) -> None:
        """End the threads."""
        self._calls.close()

    def _request(self, run: TowerRun) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._tower.model,
            model_version=self._tower.version,
            requested_output_names=list(run.outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in run.inputs.items()],
            preferred_memory=self._memory,
        )

    def _outcome(self, response: Any, run: TowerRun) -> list[NDArray[Any]] | TowerError:
        if response.has_error():
            error = response.error()
            busy = error.code() in (pb_utils.TritonError.UNAVAILABLE, pb_utils.TritonError.NOT_FOUND)
            # Triton says INTERNAL here where it stops, or the tower's process is dead and will be restarted.
            busy = busy or any(words in error.message() for words in _PASSING)
            return TowerError(
                f"Tower {self._tower.model}, version {self._tower.version}, failed: {error.message()}",
                Code.UNAVAILABLE if busy else Code.INTERNAL,
            )
        try:
            tensors = {tensor.name(): tensor for tensor in response.output_tensors()}
            return [self._array(tensors[name]) for name in run.outputs]
        except TowerError as error:
            return error

    def _array(self, output: Any) -> NDArray[Any]:
        if not output.is_cpu():
            raise TowerError(
                f"Tower {self._tower.model}, version {self._tower.version}, left output {output.name()!r} in "
                "GPU memory although CPU memory was requested, and it cannot be read there. Update the "
                "server's python backend, or serve a variant for a CPU engine.",
                Code.INTERNAL,
            )
        array: NDArray[Any] = output.as_numpy()
        return array


def version_folder(args: Mapping[str, str]) -> Path:
    """Return the folder of the version being loaded."""
    return Path(args["model_repository"]) / args["model_version"]


def parameters_of_model(args: Mapping[str, str]) -> Mapping[str, Any]:
    """Return ``parameters`` of ``config.pbtxt``."""
    parameters: Mapping[str, Any] = json.loads(args["model_config"]).get("parameters", {})
    return parameters


def counters_of_model(args: Mapping[str, str]) -> Counters:
    """Create counters on the server's metrics page, labelled with the model and its version."""
    kind = pb_utils.MetricFamily.COUNTER
    families = {
        name: pb_utils.MetricFamily(name=name, description=d, kind=kind) for name, d in DESCRIPTIONS.items()
    }
    metrics: dict[LabelledName, Any] = {}

    def publish(key: LabelledName, amount: int) -> None:
        if key not in metrics:
            name, labels = key
            metrics[key] = families[name].Metric(labels=dict(labels))
        metrics[key].increment(amount)

    labels = {"model": args["model_name"], "version": args["model_version"]}
    counters = Counters(publish, labels, log=pb_utils.Logger.log_error)
    for reason in REASONS:
        counters.declare("babeltower_failed_requests_total", reason=reason)
    return counters


def tensors_of_request(request: Any) -> dict[str, NDArray[Any]]:
    """Return the inputs of a request by name, in one pass; those that were left out are missing."""
    return {found.name(): found.as_numpy() for found in request.inputs()}


def response_from_answer(request: Any, answer: AnswerVectors | Failure) -> Any:
    """Build Triton's response from an answer."""
    if isinstance(answer, Failure):
        code = getattr(pb_utils.TritonError, answer.code.name)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(answer.message, code))
    outputs = [pb_utils.Tensor("vector", answer.vectors)]
    if answer.truncated is not None and "truncated" in request.requested_output_names():
        outputs.append(pb_utils.Tensor("truncated", answer.truncated[:, None]))
    return pb_utils.InferenceResponse(output_tensors=outputs)
