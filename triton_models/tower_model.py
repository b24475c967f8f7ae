"""Model class of the Python-based backends."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from runtime.draining import DrainedKind
from runtime.errors import EngineError, InputError
from runtime.manifest import Engine
from triton_models.adapter import response_from_answer, version_folder
from triton_models.gate import STOPPING, DrainGate
from triton_models.tower import TowerServer, tower_config_from_triton

__all__ = ["TowerModel"]


class TowerModel:
    """Triton model that serves a tower; a subclass sets the engine."""

    engine: Engine

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph and check its tensors against the configuration."""
        config = tower_config_from_triton(args["model_config"], self.engine)
        self._name = config.name
        self._inputs = list(config.inputs)
        self._server = TowerServer(version_folder(args), config, self.engine)
        self._gate = DrainGate(DrainedKind.TOWER)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch of requests."""
        with self._gate.answering(len(requests)) as is_open:
            if not is_open:
                return [response_from_answer(request, STOPPING) for request in requests]
            inputs = [
                {name: pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self._inputs}
                for r in requests
            ]
            outcomes = self._server.run(inputs, [r.requested_output_names() for r in requests])
            return [self._response(outcome) for outcome in outcomes]

    def finalize(self) -> None:
        """Release the graph."""
        self._gate.close()
        self._server.close()

    def _response(self, outcome: dict[str, Any] | EngineError | InputError) -> Any:
        """Build Triton's response; what an engine says has paths and names of this machine, for the log."""
        if isinstance(outcome, InputError):
            return _failure(str(outcome), pb_utils.TritonError.INVALID_ARG)
        if isinstance(outcome, EngineError):
            pb_utils.Logger.log_error(f"{self._name}: {outcome}")
            return _failure(
                f"{self._name} failed to compute; the server's log says why.", pb_utils.TritonError.INTERNAL
            )
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(n, a) for n, a in outcome.items()])


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
