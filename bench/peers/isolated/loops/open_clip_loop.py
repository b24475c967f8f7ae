"""open_clip's usual loop, from strings or image files to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .library import open_clip_parts
from .pictures import opened_picture


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the loop of open_clip's README; the language of NLLB texts is set beforehand."""
    model, transform, tokenizer = open_clip_parts(task["checkpoint"])
    if task["language"] is not None:
        tokenizer.tokenizer.src_lang = task["language"]

    @torch.inference_mode()
    def texts(inputs: Mapping[str, Any]) -> Any:
        return model.encode_text(tokenizer(inputs["texts"]), normalize=True).numpy()

    @torch.inference_mode()
    def images(inputs: Mapping[str, Any]) -> Any:
        batch = torch.stack([transform(opened_picture(file)) for file in inputs["files"]])
        return model.encode_image(batch, normalize=True).numpy()

    return texts if task["tower"] == "text" else images
