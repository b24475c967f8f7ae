"""clip-retrieval's inference: the loader and the two methods that its workers call.

The library leaves open_clip's models in training mode, so that dropout makes text vectors random.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open a transformers folder, or an architecture registered with open_clip and its weight file."""
    from all_clip import load_clip

    from .pictures import opened_picture

    if task["tower"] == "text" and task["language"] is not None:
        raise ValueError("clip-retrieval's inference takes no language for a text; this tower needs one")
    name = f"hf_clip:{task['checkpoint']}" if task["family"] == "altclip" else _registered(task)
    model, preprocess, tokenizer = load_clip(
        clip_model=name, use_jit=False, warmup_batch_size=1, device="cpu"
    )

    @torch.inference_mode()
    def run(inputs: Mapping[str, Any]) -> Any:
        if "texts" in inputs:
            vectors = model.encode_text(tokenizer([str(text) for text in inputs["texts"]]))
        else:
            images = [preprocess(opened_picture(str(file)).convert("RGB")) for file in inputs["files"]]
            vectors = model.encode_image(torch.stack(images))
        return (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()

    return run


def _registered(task: Mapping[str, Any]) -> str:
    """Register an open_clip checkpoint's architecture, and return the loader's name of the model.

    The installed open_clip loads architectures by name, not folders.
    """
    import open_clip

    folder = Path(task["checkpoint"])
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    architecture = f"local-{task['model']}"
    with tempfile.TemporaryDirectory() as registered:
        (Path(registered) / f"{architecture}.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(registered)
    (weights,) = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return f"open_clip:{architecture}/{weights}"
