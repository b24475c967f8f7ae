"""This project's runtime: prepared inputs through a backend, strings and files through an Encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """One thread; ``repository`` is the model's folder in a Triton repository."""
    from runtime.backends import open_backend
    from runtime.encoder import Encoder
    from runtime.manifest import Engine, Manifest, Precision

    engine, precision = Engine(task["engine"]), Precision(task["precision"])
    if task["stage"] == "whole":
        encoder = Encoder.open(
            task["repository"],
            engine=engine,
            precision=precision,
            threads=1,
            default_language=task["language"],
        )
        if task["tower"] == "text":
            return lambda inputs: encoder.embed_texts(inputs["texts"])
        return lambda inputs: encoder.embed_images(inputs["files"])
    model = Path(task["repository"])
    variant = Manifest.read(model).variant(precision, engine.value)
    files = variant.text if task["tower"] == "text" else variant.image
    graph = model.parent / files.model / str(files.version) / files.graph
    backend = open_backend(engine, graph, precision=precision, threads=1)
    names = ("pixels",) if task["tower"] == "image" else ("input_ids", "attention_mask")
    return lambda inputs: backend.run({name: inputs[name] for name in names}, ["vector"])[0]
