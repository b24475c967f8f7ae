"""PyTorch with the library's own model: eager, compiled, or in bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .library import arguments, prepared_tower


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the model; ``mode`` is ``eager``, ``compile`` or ``bf16``."""
    tower, mode = prepared_tower(task), task["mode"]
    if mode == "bf16":
        tower = copy.deepcopy(tower).to(torch.bfloat16)
    call: Callable[..., torch.Tensor] = tower
    if mode == "compile":
        call = torch.compile(tower)

    @torch.inference_mode()
    def run(inputs: Mapping[str, Any]) -> Any:
        given = arguments(task["tower"], inputs)
        if mode == "bf16" and task["tower"] == "image":
            given = tuple(array.to(torch.bfloat16) for array in given)
        return call(*given).numpy()

    return run
