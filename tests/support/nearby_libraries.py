"""Libraries of the families without a trained sample, called as their documentation shows.

Nothing of ``export/`` is used here, so that its own references are under test too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Library:
    """A family's library over one checkpoint: unit vectors, and the token ids of one text."""

    texts: Callable[[Sequence[str]], Floats]
    images: Callable[[Sequence[Image.Image]], Floats]
    token_ids: Callable[[str], list[int]]

    def text_vectors(self, texts: Sequence[str]) -> Floats:
        """Embed texts one by one, as no library's vector depends on the batch."""
        with torch.no_grad():
            return np.concatenate([self.texts([text]) for text in texts])

    def image_vectors(self, images: Sequence[Image.Image]) -> Floats:
        """Embed images."""
        with torch.no_grad():
            return self.images(images)


def library_of(family: str, arguments: dict[str, Any], work: Path) -> Library:
    """Open a checkpoint with its own library; ``arguments`` are those of ``tiny_nearby``."""
    return _OPENERS[family](arguments, work)


def _xlm_roberta_large(arguments: dict[str, Any], work: Path) -> Library:
    folder = Path(shutil.copytree(arguments["checkpoint"], work / "open_clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    # open_clip takes the text model's configuration from the hub, by these names
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    config["model_cfg"]["text_cfg"] |= names
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return _open_clip(folder)


def _m_clip(arguments: dict[str, Any], work: Path) -> Library:
    from multilingual_clip.Config_MCLIP import MCLIPConfig
    from multilingual_clip.pt_multilingual_clip import MultilingualCLIP
    from transformers import AutoTokenizer

    folder = arguments["checkpoint"]
    model = MultilingualCLIP(MCLIPConfig(**json.loads((folder / "config.json").read_text())))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.load_state_dict(state, strict=False)  # it holds buffers of older versions too
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, config=model.transformer.config)
    return Library(
        texts=lambda texts: unit(model(list(texts), tokenizer)),
        images=_open_clip(arguments["image_tower"], text=False).images,
        token_ids=lambda text: tokenizer(text)["input_ids"],
    )


def _open_clip(folder: Path, *, text: bool = True) -> Library:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}") if text else None

    def token_ids(text: str) -> list[int]:
        ids: list[int] = tokenizer([text])[0].tolist()
        return ids

    return Library(
        texts=lambda texts: unit(model.encode_text(tokenizer(list(texts)))),
        images=lambda images: unit(model.encode_image(torch.stack([preprocess(i) for i in images]))),
        token_ids=token_ids,
    )


def unit(features: Tensor) -> Floats:
    """L2-normalise rows."""
    return np.asarray((features / features.norm(dim=-1, keepdim=True)).detach(), np.float32)


def _siglip2_open_clip(arguments: dict[str, Any], work: Path) -> Library:
    folder = Path(shutil.copytree(arguments["checkpoint"], work / "open_clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return _open_clip(folder)


def _siglip2(arguments: dict[str, Any], work: Path) -> Library:
    """As the model card says: ``padding="max_length", max_length=64``, no mask."""
    from transformers import Siglip2Tokenizer, SiglipModel

    folder = arguments["checkpoint"]
    tokenizer = Siglip2Tokenizer.from_pretrained(folder)

    def ids_of(texts: Sequence[str]) -> Tensor:
        found: Tensor = tokenizer(
            list(texts),
            padding="max_length",
            max_length=64,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        return found

    return _transformers(SiglipModel, folder, ids_of)


def _metaclip2(arguments: dict[str, Any], work: Path) -> Library:
    """As the documentation shows: a processor's ids and mask."""
    from transformers import AutoTokenizer, MetaClip2Model

    folder = arguments["checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids_of(texts: Sequence[str]) -> Tensor:
        found: Tensor = tokenizer(list(texts), truncation=True, max_length=77, return_tensors="pt")[
            "input_ids"
        ]
        return found

    return _transformers(MetaClip2Model, folder, ids_of)


def _transformers(kind: Any, folder: Path, ids_of: Callable[[Sequence[str]], Tensor]) -> Library:
    from transformers import AutoImageProcessor

    model = kind.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def images(given: Sequence[Image.Image]) -> Floats:
        pixels = processor(list(given), return_tensors="pt")["pixel_values"]
        return unit(model.get_image_features(pixels).pooler_output)

    return Library(
        texts=lambda texts: unit(model.get_text_features(ids_of(texts)).pooler_output),
        images=images,
        token_ids=lambda text: ids_of([text])[0].tolist(),
    )


_OPENERS = {
    "xlm-roberta-clip": _xlm_roberta_large,
    "m-clip": _m_clip,
    "siglip2": _siglip2,
    "siglip2-open-clip": _siglip2_open_clip,
    "metaclip2": _metaclip2,
}
