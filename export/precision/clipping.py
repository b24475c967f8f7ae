"""Activation ranges and clipping thresholds for quantization, measured on calibration batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.errors import ExportError

__all__ = ["Batches", "ClipMethod", "ClipRange", "channel_magnitudes", "clip_extents", "tensors_of_batches"]

Batches = Sequence[Mapping[str, NDArray[Any]]]
Floats = NDArray[np.float32]

_BINS = 2_048
_LEVELS = 128
_STEP = 16


class ClipMethod(str, Enum):
    """Method to choose the clipping threshold of an activation.

    ``MIN_MAX`` clips nothing, ``PERCENTILE`` clips a fixed share, ``ENTROPY`` minimises the divergence from
    the original distribution, ``MSE`` the expected squared error of rounding and clipping.
    """

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


@dataclass(frozen=True, slots=True)
class ClipRange:
    """Range of a tensor's values, before or after clipping."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """Largest absolute value of the range."""
        return max(abs(self.low), abs(self.high))

    def clipped(self, magnitude: float) -> ClipRange:
        """Return the range clipped to ±magnitude."""
        return ClipRange(max(self.low, -magnitude), min(self.high, magnitude))


def clip_extents(
    model: onnx_ir.Model,
    folder: Path,
    names: Collection[str],
    batches: Batches,
    *,
    method: ClipMethod,
    percentile: float,
) -> dict[str, ClipRange]:
    """Measure the clipping range of each tensor, by name.

    Args:
        model: FP32 model; external weights are read from ``folder``.
        batches: Inputs by name.
        percentile: Percentile of magnitudes, for ``ClipMethod.PERCENTILE``.

    Raises:
        ExportError: there are no batches, or a tensor is not finite.
    """
    lows, highs = _extremes(model, folder, names, batches, by_channel=False)
    found = {name: ClipRange(float(lows[name]), float(highs[name])) for name in names}
    if method is ClipMethod.MIN_MAX:
        return found
    counts = _histograms(model, folder, {name: e.magnitude for name, e in found.items()}, batches)
    return {
        name: extent.clipped(extent.magnitude * _share_kept(counts[name], method, percentile))
        for name, extent in found.items()
    }


def channel_magnitudes(
    model: onnx_ir.Model, folder: Path, names: Collection[str], batches: Batches
) -> dict[str, Floats]:
    """Measure the largest magnitude per channel, the last axis: float32 (channels,) by tensor name."""
    lows, highs = _extremes(model, folder, names, batches, by_channel=True)
    return {name: np.maximum(np.abs(lows[name]), np.abs(highs[name])) for name in names}


def tensors_of_batches(
    model: onnx_ir.Model, folder: Path, names: Sequence[str], batches: Batches
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Run an FP32 graph and yield the named tensors, one batch at a time.

    Raises:
        ExportError: there are no batches.
    """
    graph = onnx_ir.to_proto(model)
    del graph.graph.output[:]
    for name in names:
        graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    yield from _runs(graph, folder, batches)


def _extremes(
    model: onnx_ir.Model, folder: Path, names: Collection[str], batches: Batches, *, by_channel: bool
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Measure the smallest and largest values, reduced inside the graph to avoid copying activations."""
    ranks = _ranks(model, names) if by_channel else {}
    graph = onnx_ir.to_proto(model)
    del graph.graph.output[:]
    for op in ("ReduceMin", "ReduceMax"):
        for name in names:
            output, inputs = f"{op} of {name}", [name]
            if by_channel:
                inputs.append(f"axes for {output}")
                axes = helper.make_tensor(
                    inputs[1], TensorProto.INT64, [ranks[name] - 1], range(ranks[name] - 1)
                )
                graph.graph.initializer.append(axes)
            graph.graph.node.append(helper.make_node(op, inputs, [output], keepdims=0))
            graph.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    runs = list(_runs(graph, folder, batches))
    if not all(np.isfinite(value).all() for run in runs for value in run.values()):
        raise ExportError(
            "An activation is not finite: the checkpoint is damaged, or the calibration data is invalid."
        )
    return (
        {name: np.min([run[f"ReduceMin of {name}"] for run in runs], axis=0) for name in names},
        {name: np.max([run[f"ReduceMax of {name}"] for run in runs], axis=0) for name in names},
    )


def _histograms(
    model: onnx_ir.Model, folder: Path, magnitudes: Mapping[str, float], batches: Batches
) -> dict[str, NDArray[np.int64]]:
    """Count magnitudes per bin, from 0 to the largest: int64 (bins,) by tensor name."""
    counts = {name: np.zeros(_BINS, np.int64) for name in magnitudes}
    for run in tensors_of_batches(model, folder, list(magnitudes), batches):
        for name, largest in magnitudes.items():
            place = np.abs(run[name].ravel()) * np.float32(_BINS / (largest or 1.0))
            counts[name] += np.bincount(np.minimum(place.astype(np.int32), _BINS - 1), minlength=_BINS)
    return counts


def _share_kept(counts: NDArray[np.int64], method: ClipMethod, percentile: float) -> float:
    """Return the clipping threshold as a share of the largest magnitude."""
    if method is ClipMethod.PERCENTILE:
        shares = counts.cumsum() / counts.sum()
        return float(np.searchsorted(shares, percentile / 100) + 1) / _BINS
    counts = counts.copy()
    counts[0] = 0  # zeros (padding, ReLU) are exact at any threshold, and would dominate the cost
    cost = _divergence if method is ClipMethod.ENTROPY else _squared_error
    return min(range(_LEVELS, _BINS + 1, _STEP), key=lambda end: cost(counts, end)) / _BINS


def _squared_error(counts: NDArray[np.int64], end: int) -> float:
    """Return the squared error of rounding to steps of ``end / 127`` and clipping at ``end``, in bins²."""
    # rounding to a step s has a uniform error of variance s² / 12
    step = end / (_LEVELS - 1)
    beyond = np.arange(_BINS - end) + 0.5
    return float(counts[:end].sum() * step**2 / 12 + (counts[end:] * beyond**2).sum())


def _divergence(counts: NDArray[np.int64], end: int) -> float:
    """Return the Kullback–Leibler divergence between clipped values and their quantized form."""
    # TensorRT's entropy calibration: merge the bins into 128 levels, spread each level over its non-empty
    # bins, and compare with the histogram whose last bin holds everything clipped.
    kept = counts[:end].astype(np.float64)
    group = np.arange(end) * _LEVELS // end
    present = kept > 0
    total = np.bincount(group, kept, _LEVELS)
    filled = np.bincount(group, present, _LEVELS)
    quantized = np.where(present, (total / np.maximum(filled, 1))[group], 0.0)
    clipped = kept.copy()
    clipped[-1] += counts[end:].sum()
    if not quantized.any():
        return math.inf
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + 10 * lost)


def _ranks(model: onnx_ir.Model, names: Collection[str]) -> dict[str, int]:
    ranks = {
        value.name: len(value.shape)
        for node in model.graph
        for value in node.outputs
        if value.name in names and value.shape is not None
    }
    if missing := sorted(set(names) - set(ranks)):
        raise ExportError(f"The graph has no shape for {missing[0]!r}; export it again.")
    return {name: ranks[name] for name in names}


def _runs(graph: onnx.ModelProto, folder: Path, batches: Batches) -> Iterator[dict[str, NDArray[Any]]]:
    if not batches:
        raise ExportError("No calibration batches were given; pass at least one for each tower.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # With full fusion some tensors would be computed twice: inside the fused node, and to be measured.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in graph.graph.output]
    for batch in batches:
        yield dict(zip(names, session.run(names, dict(batch)), strict=True))
