"""Text model in transformers' format and the layers after it, for libraries of text encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Tail", "tail_of"]

torch.set_num_threads(1)


class Tail(nn.Module):
    """Layers from hidden states and mask to unit vectors."""

    def __init__(self, pooling: str, layers: list[nn.Module]) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return float32 (rows, dim)."""
        pooled = hidden[:, 0]
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        for layer in self.layers:
            pooled = layer(pooled)
        return nn.functional.normalize(pooled, dim=-1)


def tail_of(folder: str) -> Tail:
    """Read ``tail.json`` and ``tail.npz``."""
    facts = json.loads((Path(folder) / "tail.json").read_text(encoding="utf-8"))
    with np.load(Path(folder) / "tail.npz") as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays}
    layers = [_layer(kind, _of(i, state)) for i, kind in enumerate(facts["layers"])]
    return Tail(facts["pooling"], layers).eval().requires_grad_(False)


def _of(i: int, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.partition("/")[2]: tensor for name, tensor in state.items() if name.startswith(f"{i}/")}


def _layer(kind: str, state: Mapping[str, Any]) -> nn.Module:
    layer: nn.Module
    if kind == "Linear":
        n_out, n_in = state["weight"].shape
        layer = nn.Linear(n_in, n_out, bias="bias" in state)
    elif kind == "LayerNorm":
        layer = nn.LayerNorm(len(state["weight"]), eps=1e-5)
    elif kind == "GELU":
        layer = nn.GELU()
    else:
        raise ValueError(f"unknown layer of kind {kind} after the text model")
    layer.load_state_dict(dict(state))
    return layer
