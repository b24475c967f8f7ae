"""Graphs of a timed tower in each precision, made from its skeleton where they are timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir

from bench.gpu.skeletons import graph_from_skeleton
from export.graphs.float_types import float_values
from export.precision.fp16 import fp16_from_onnx
from export.variants import forms_for
from runtime.manifest import Engine, Precision

__all__ = ["PRECISIONS", "SAMPLE_FORMS", "graph_for_gpu"]

SAMPLE_FORMS = forms_for(
    [Precision.FP32, Precision.FP16], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME]
)
"""Forms that the samples are exported in for the gate."""

PRECISIONS: Sequence[Precision] = (Precision.FP16, Precision.FP32)
"""Timed precisions, in order of worth."""

_MAGNITUDE = 1.0
"""Assumed magnitude of every activation: random weights keep all of them far below FP16's largest."""


def graph_for_gpu(skeleton: Path, precision: Precision, folder: Path) -> Path:
    """Return a tower's graph with random weights in a precision, writing it if it is missing."""
    source = graph_from_skeleton(skeleton, folder)
    if precision is Precision.FP32:
        return source
    target = source.with_name(f"{source.stem}-{precision.value}.onnx")
    if not target.is_file():
        model = onnx_ir.load(source)
        ranges = {str(value.name): _MAGNITUDE for node in model.graph for value in float_values(node)}
        fp16_from_onnx(source, target, data_name=f"{target.stem}.data", ranges=ranges)
    return target
