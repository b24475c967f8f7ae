"""OpenVINO from the PyTorch model, as in its documentation: in fp32, bf16, or quantized by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .library import arguments, prepared_tower

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the model on one thread; ``hint`` overrides the precision of its unquantized parts."""
    import openvino

    tower = task["tower"]
    model = _converted(task)
    if task["precision"] == "int8":
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        calibration = [tuple(batch) for batch in _calibration(task)]
        model = nncf.quantize(
            model,
            nncf.Dataset(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": 1,
            "INFERENCE_PRECISION_HINT": task.get("hint", _HINTS[task["precision"]]),
        },
    )
    names = ("pixel_values",) if tower == "image" else ("input_ids", "attention_mask")
    n_inputs = len(compiled.inputs)

    def run(inputs: Mapping[str, Any]) -> Any:
        return compiled([inputs[name] for name in names][:n_inputs])[0]

    return run


def _converted(task: Mapping[str, Any]) -> Any:
    import openvino

    tower = task["tower"]
    with np.load(task["example"]) as arrays:
        example = arguments(tower, dict(arrays))
    module = prepared_tower(task)
    shape: list[Any] = [-1, 3, *example[0].shape[2:]] if tower == "image" else [-1, -1]
    own = module.is_open_clip or tower == "image"
    given = example[:1] if own else example
    return openvino.convert_model(module, example_input=given, input=[shape] * len(given))


def _calibration(task: Mapping[str, Any]) -> list[list[Any]]:
    names = ("pixel_values",) if task["tower"] == "image" else ("input_ids", "attention_mask")
    if task["tower"] == "text" and "open_clip_config.json" in task["files"]:
        names = names[:1]
    with np.load(task["calibration"]) as arrays:
        n = len({key.split("/")[0] for key in arrays})
        return [[arrays[f"{i}/{name}"] for name in names] for i in range(n)]
