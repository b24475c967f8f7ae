"""infinity: its asynchronous engine on a sentence-transformers folder, one batch after the other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .sentence_transformers_loop import text_model


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open a text tower as a sentence-transformers model, an image tower as the checkpoint itself."""
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    folder = task["checkpoint"]
    if task["tower"] == "text":
        if task["language"] is not None:
            raise ValueError("infinity's engine takes no language for a text; this tower needs one")
        folder = tempfile.mkdtemp()
        text_model(task["text_encoder"], "torch").save(folder)
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(model_name_or_path=folder, engine="torch", device="cpu", bettertransformer=False)
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def run(inputs: Mapping[str, Any]) -> Any:
        asked = (
            engine.embed([str(text) for text in inputs["texts"]])
            if "texts" in inputs
            else (engine.image_embed(images=[Path(str(file)).read_bytes() for file in inputs["files"]]))
        )
        vectors, _ = loop.run_until_complete(asked)
        return np.stack(vectors).astype(np.float32)

    return run
