"""transformers' usual loop, from strings or image files to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .library import transformers_model
from .pictures import opened_picture


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the loop of transformers' documentation of CLIP-like models."""
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = task["checkpoint"]
    model = transformers_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = (
        AutoImageProcessor.from_pretrained(folder, backend="pil") if task["tower"] == "image" else None
    )

    @torch.inference_mode()
    def texts(inputs: Mapping[str, Any]) -> Any:
        batch = tokenizer(inputs["texts"], padding=True, truncation=True, max_length=77, return_tensors="pt")
        features = model.get_text_features(**batch).pooler_output
        return torch.nn.functional.normalize(features, dim=-1).numpy()

    @torch.inference_mode()
    def images(inputs: Mapping[str, Any]) -> Any:
        assert processor is not None
        images = [opened_picture(file) for file in inputs["files"]]
        features = model.get_image_features(**processor(images, return_tensors="pt")).pooler_output
        return torch.nn.functional.normalize(features, dim=-1).numpy()

    return texts if task["tower"] == "text" else images
