"""Triton model that answers texts with constant vectors: what a front end costs before it does anything.

It is copied into a repository as ``model.py``, and takes a front end's requests under the same configuration.
With the parameter ``tower``, it also calls a tower once a batch, with constant token ids.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

__all__ = ["TritonPythonModel"]

_TOKEN, _N_TOKENS = 5, 12
"""Any token, and about as many of them as the sample captions have."""

_MOST_ROWS = 64


class TritonPythonModel:
    """Model class loaded by Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the vectors' width, and the tower if there is one."""
        parameters = json.loads(args["model_config"])["parameters"]
        dim = int(parameters["babeltower_dim"]["string_value"])
        self._vectors = np.full((_MOST_ROWS, dim), dim**-0.5, dtype=np.float32)
        self._tower = parameters.get("tower", {}).get("string_value")
        inputs = parameters.get("tower_inputs", {}).get("string_value", "")
        self._inputs = {
            name: np.full((_MOST_ROWS, _N_TOKENS), _TOKEN if name == "input_ids" else 1, dtype=np.int64)
            for name in inputs.split()
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Read every input, and answer each request with one vector."""
        for request in requests:
            for tensor in request.inputs():
                tensor.as_numpy()
        vectors = self._vectors if self._tower is None else self._from_tower(min(len(requests), _MOST_ROWS))
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("vector", vectors[i % len(vectors)][np.newaxis])])
            for i in range(len(requests))
        ]

    def _from_tower(self, n_rows: int) -> Any:
        request = pb_utils.InferenceRequest(
            model_name=self._tower,
            requested_output_names=["vector"],
            inputs=[pb_utils.Tensor(name, array[:n_rows]) for name, array in self._inputs.items()],
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "vector").as_numpy()
