"""Triton model ``NAME_image``: image files in, vectors out; see ``triton_models/image_frontend.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this version's own code, never another's

from runtime.draining import DrainedKind
from runtime.preprocessing.served_limits import REQUEST_MEMORY_VARIABLE
from triton_models.adapter import (
    TritonTower,
    counters_of_model,
    parameters_of_model,
    response_from_answer,
    tensors_of_request,
    version_folder,
)
from triton_models.gate import STOPPING, DrainGate
from triton_models.image_frontend import ImageFrontEnd, ImageRequest
from triton_models.spec import ImageLimits, ImageSpec, limits_from_parameters, spec_from_folder


class TritonPythonModel:
    """Model class loaded by Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's files."""
        spec = spec_from_folder(ImageSpec, version_folder(args))
        self._counters = counters_of_model(args)
        limits = limits_from_parameters(ImageLimits, parameters_of_model(args))
        self._tower = TritonTower(spec.tower)
        self._front_end = ImageFrontEnd(
            spec,
            limits.with_memory(os.environ.get(REQUEST_MEMORY_VARIABLE)),
            self._tower,
            self._counters,
        )
        self._gate = DrainGate(DrainedKind.FRONT_END)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch of requests."""
        with self._gate.answering(len(requests)) as is_open:
            if not is_open:
                return [response_from_answer(request, STOPPING) for request in requests]
            answers = self._front_end.answers([_request(request) for request in requests])
            return [response_from_answer(r, a) for r, a in zip(requests, answers, strict=True)]

    def finalize(self) -> None:
        """Stop the threads and publish the last counts."""
        self._gate.close()
        self._front_end.close()
        self._tower.close()
        self._counters.close()


def _request(request: Any) -> ImageRequest:
    tensors = tensors_of_request(request)
    # Triton rejects requests without a required input.
    return ImageRequest(tensors["image"], tensors.get("dim"), request.is_cancelled)
