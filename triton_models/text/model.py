"""Triton model ``NAME_text``: texts and languages in, vectors out; see ``triton_models/text_frontend.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this version's own code, never another's

from runtime.draining import DrainedKind
from runtime.manifest import TOKENIZER_FILE
from runtime.preprocessing.text import Tokenizer
from triton_models.adapter import (
    TritonTower,
    counters_of_model,
    parameters_of_model,
    response_from_answer,
    tensors_of_request,
    version_folder,
)
from triton_models.gate import STOPPING, DrainGate
from triton_models.spec import TextLimits, TextSpec, limits_from_parameters, spec_from_folder
from triton_models.text_frontend import TextFrontEnd, TextRequest

_NO_PARAMETERS = ("", "{}")


class TritonPythonModel:
    """Model class loaded by Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's files."""
        folder = version_folder(args)
        spec = spec_from_folder(TextSpec, folder)
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, spec.preprocessing)
        self._counters = counters_of_model(args)
        self._tower = TritonTower(spec.tower)
        self._front_end = TextFrontEnd(
            spec,
            limits_from_parameters(TextLimits, parameters_of_model(args)),
            tokenizer,
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
        self._tower.close()
        self._counters.close()


def _request(request: Any) -> TextRequest:
    tensors = tensors_of_request(request)
    parameters = request.parameters()
    return TextRequest(
        tensors["text"],  # Triton rejects requests without a required input
        tensors.get("language"),
        tensors.get("dim"),
        allows_blank=parameters not in _NO_PARAMETERS and json.loads(parameters).get("blank") == "embed",
    )
