"""ONNX Runtime's transformers optimizer on torch's own export; for int8, then dynamic quantization."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .library import PreparedTower, arguments, prepared_tower


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open a session on one thread, with default options otherwise."""
    import onnxruntime

    tower = task["tower"]
    module = prepared_tower(task)
    with np.load(task["example"]) as arrays:
        example = arguments(tower, dict(arrays))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "optimized.onnx"
        _optimize(module, example, graph)
        if task["precision"] == "int8":
            graph = _quantized(graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Mapping[str, Any]) -> Any:
        return session.run(None, {name: inputs[name] for name in names})[0]

    return run


def _optimize(module: PreparedTower, example: tuple[torch.Tensor, ...], graph: Path) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    names = ["pixel_values"] if module.tower == "image" else ["input_ids", "attention_mask"]
    dynamic = {0: "batch"} if module.tower == "image" else {0: "batch", 1: "sequence"}
    _use_plain_attention(module)
    exported = graph.with_name("exported.onnx")
    torch.backends.mha.set_fastpath_enabled(False)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            module,
            example,
            str(exported),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["vector"],
            dynamic_axes={**dict.fromkeys(names, dynamic), "vector": {0: "batch"}},
        )
    kind = "vit" if module.tower == "image" else "bert"
    options = FusionOptions(kind)
    best = optimizer.optimize_model(str(exported), model_type=kind, optimization_options=options, opt_level=1)
    best.save_model_to_file(str(graph), use_external_data_format=exported.stat().st_size > 1 << 30)


def _use_plain_attention(module: PreparedTower) -> None:
    """Switch to transformers' eager attention, the form that the optimizer recognises."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"


def _quantized(graph: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = graph.with_name("quantized.onnx")
    quantize_dynamic(
        str(graph),
        str(quantized),
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1, "MatMulConstBOnly": True},
    )
    return quantized
