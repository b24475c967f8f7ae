"""clip-retrieval's inference: the loader and the two methods that its workers call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A checkpoint of transformers or open_clip in a local folder, by the loader's own prefixes."""
    from all_clip import load_clip
    from PIL import Image

    if task["language"] is not None:
        raise ValueError("clip-retrieval's inference takes no language for a text; this tower needs one")
    prefix = "hf_clip:" if task["family"] == "altclip" else "open_clip:local-dir:"
    model, preprocess, tokenizer = load_clip(
        clip_model=prefix + task["checkpoint"], use_jit=False, warmup_batch_size=1, device="cpu"
    )

    @torch.inference_mode()
    def run(inputs: Mapping[str, Any]) -> Any:
        if "texts" in inputs:
            vectors = model.encode_text(tokenizer([str(text) for text in inputs["texts"]]))
        else:
            images = [preprocess(Image.open(str(file)).convert("RGB")) for file in inputs["files"]]
            vectors = model.encode_image(torch.stack(images))
        return (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()

    return run
