"""The embedding-space fingerprint: equal exactly when vectors may be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.manifest import ImagePreprocessing, TextPreprocessing

__all__ = ["embedding_space_fingerprint"]


def embedding_space_fingerprint(
    state: Mapping[str, Tensor], tokenizer_json: str, text: TextPreprocessing, image: ImagePreprocessing
) -> str:
    """``bt1-`` and 32 hex digits of a sha256 over weights, tokenizer and preprocessing.

    Weights count as FP32 values under the library's own names, so a checkpoint has one fingerprint
    whether it is stored as safetensors or ``.bin``, in FP16 or FP32. Precision variants share it.
    """
    digest = hashlib.sha256(b"babeltower embedding space 1\n")
    for name in sorted(state):
        tensor = state[name].detach().to(torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).numpy().data)
    settings = {
        "tokenizer": json.loads(tokenizer_json),
        "text": dataclasses.asdict(text),
        "image": dataclasses.asdict(image),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return f"bt1-{digest.hexdigest()[:32]}"
