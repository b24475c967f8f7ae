"""Each family's own library: its model, tokenizer and image transform."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PreparedTower", "is_open_clip", "open_clip_parts", "prepared_tower", "transformers_model"]

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def is_open_clip(folder: str) -> bool:
    """Return True if a folder has an open_clip checkpoint; otherwise it is a transformers one."""
    return (Path(folder) / "open_clip_config.json").is_file()


@functools.cache
def open_clip_parts(folder: str) -> tuple[Any, Callable[[Any], Tensor], Any]:
    """Return model, image transform and tokenizer, loaded as in open_clip's README."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval().requires_grad_(False), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@functools.cache
def transformers_model(folder: str) -> Any:
    """Load the model that a folder's ``config.json`` names."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


class PreparedTower(nn.Module):
    """Tower from prepared inputs, (ids, mask) or normalised pixels, to unit vectors."""

    def __init__(self, model: nn.Module, *, tower: str, is_open_clip: bool) -> None:
        super().__init__()
        self.model, self.tower, self.is_open_clip = model, tower, is_open_clip

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return float32 (rows, dim)."""
        model: Any = self.model
        if self.tower == "image":
            features = (
                model.encode_image(*inputs)
                if self.is_open_clip
                else model.get_image_features(*inputs).pooler_output
            )
        elif self.is_open_clip:
            features = model.encode_text(inputs[0])  # it derives the mask from the ids
        else:
            features = model.get_text_features(inputs[0], attention_mask=inputs[1]).pooler_output
        return nn.functional.normalize(features.float(), dim=-1)


def prepared_tower(task: Mapping[str, Any]) -> PreparedTower:
    """Wrap the library's own model as a tower of prepared inputs."""
    folder = task["checkpoint"]
    own = is_open_clip(folder)
    model = open_clip_parts(folder)[0] if own else transformers_model(folder)
    return PreparedTower(model, tower=task["tower"], is_open_clip=own).eval()


def arguments(tower: str, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return a tower's inputs as tensors."""
    names = ("pixel_values",) if tower == "image" else ("input_ids", "attention_mask")
    return tuple(torch.from_numpy(inputs[name]) for name in names)
