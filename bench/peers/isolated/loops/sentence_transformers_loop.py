"""sentence-transformers, from strings to unit vectors, on each of its backends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .text_encoder import tail_of


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the text model, its pooling and its projection as sentence-transformers' modules.

    An image tower is the checkpoint itself, as for the library's models of images and texts.
    """
    if task["tower"] == "image":
        return _images(task)
    model = text_model(task["text_encoder"], task["backend"])
    if task["language"] is not None:
        model.tokenizer.src_lang = task["language"]
    return lambda inputs: model.encode(
        inputs["texts"], batch_size=len(inputs["texts"]), show_progress_bar=False
    )


def text_model(folder: str, backend: str) -> Any:
    """Build a text encoder of several modules."""
    from sentence_transformers import SentenceTransformer, models

    facts = json.loads((Path(folder) / "tail.json").read_text(encoding="utf-8"))
    options: dict[str, Any] = {} if backend == "torch" else {"backend": backend}
    if backend == "onnx":
        options["model_args"] = {"provider": "CPUExecutionProvider", "session_options": _one_thread()}
    if backend == "openvino":
        options["model_args"] = {"ov_config": {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}}
    encoder = models.Transformer(folder, max_seq_length=facts["context_length"], **options)
    width = encoder.get_word_embedding_dimension()
    modules = [encoder, models.Pooling(width, pooling_mode=facts["pooling"])]
    tail = tail_of(folder).layers
    for i, layer in enumerate(tail):
        if isinstance(layer, torch.nn.LayerNorm):
            norm = models.LayerNorm(layer.normalized_shape[0])
            norm.norm.load_state_dict(layer.state_dict())
            modules.append(norm)
        elif isinstance(layer, torch.nn.Linear):
            bends = i + 1 < len(tail) and isinstance(tail[i + 1], torch.nn.GELU)
            dense = models.Dense(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                activation_function=torch.nn.GELU() if bends else torch.nn.Identity(),
            )
            dense.linear.load_state_dict(layer.state_dict())
            modules.append(dense)
    return SentenceTransformer(modules=[*modules, models.Normalize()], device="cpu")


def _one_thread() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def _images(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    from sentence_transformers import SentenceTransformer

    from .pictures import opened_picture

    model = SentenceTransformer(task["checkpoint"], device="cpu", backend=task["backend"])

    def run(inputs: Mapping[str, Any]) -> Any:
        images = [opened_picture(file) for file in inputs["files"]]
        return model.encode(
            images, batch_size=len(images), normalize_embeddings=True, show_progress_bar=False
        )

    return run
