"""optimum-onnx: its export of the text model, and its class to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .text_encoder import tail_of


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the text model; for an image tower, try the checkpoint itself to get the library's error."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    is_text = task["tower"] == "text"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = ORTModelForFeatureExtraction.from_pretrained(
        task["text_encoder"] if is_text else task["checkpoint"], export=True, session_options=options
    )
    if not is_text:
        raise ValueError("ORTModelForFeatureExtraction opened the checkpoint, but takes no images")
    tail = tail_of(task["text_encoder"])

    @torch.inference_mode()
    def run(inputs: Mapping[str, Any]) -> Any:
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return tail(hidden, mask).numpy()

    return run
