"""Move outlier channels from activations into weights before quantization (SmoothQuant).

A channel much larger than the others uses up the int8 range. Dividing it by a factor where it is computed,
and multiplying the rows of the weights that use it, is exact in real arithmetic and leaves more range to the
other channels. This is possible for:

- a LayerNormalization used only by linear layers (M2M100 and vision blocks, but not post-norm RoBERTa, whose
  normalised values are also the residual);
- the value projection before the output projection, since attention mixes tokens within each channel;
- a linear layer with ReLU before the next linear layer.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438): factor = max|x|^alpha / max|w|^(1 − alpha).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import constant, drop_unused, set_weight
from export.precision.clipping import channel_magnitudes
from runtime.errors import ExportError

__all__ = ["smooth"]

_MOVES_ONLY = frozenset({"Reshape", "Transpose"})


@dataclass(frozen=True, slots=True)
class _Place:
    """Tensor used only by ``readers``, whose channels can be scaled in the given inputs of ``makers``."""

    tensor: onnx_ir.Value
    makers: tuple[tuple[onnx_ir.Node, int], ...]
    readers: tuple[onnx_ir.Node, ...]


def smooth(
    model: onnx_ir.Model,
    folder: Path,
    batches: Sequence[Mapping[str, NDArray[Any]]],
    *,
    alpha: float,
) -> int:
    """Smooth all suitable tensors, in place.

    Args:
        model: FP32 model; external weights are read from ``folder``.
        batches: Calibration inputs by name.
        alpha: Exponent of the activations' magnitude: 1 equalises the activations' channels, 0 the weights'
            rows, 0.5 balances both.

    Returns:
        Number of smoothed tensors.

    Raises:
        ExportError: alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ExportError(f"Smoothing alpha {alpha} is out of range; expected between 0 and 1.")
    places = _places(model.graph)
    names = [str(place.tensor.name) for place in places]
    if not places:
        return 0
    magnitudes = channel_magnitudes(model, folder, names, batches)
    for place, name in zip(places, names, strict=True):
        _move(place, magnitudes[name], alpha)
    drop_unused(model)
    return len(places)


def _places(graph: onnx_ir.Graph) -> list[_Place]:
    linears = [node for node in graph if node.op_type == "MatMul" and constant(node.inputs[1]) is not None]
    tensors = dict.fromkeys(node.inputs[0] for node in linears)
    found = []
    for tensor in tensors:
        if tensor is None or tensor.is_graph_output():
            continue
        readers = tuple(use.node for use in tensor.uses())
        if all(reader in linears for reader in readers) and (makers := _makers(tensor)):
            found.append(_Place(tensor, makers, readers))
    return found


def _makers(tensor: onnx_ir.Value) -> tuple[tuple[onnx_ir.Node, int], ...]:
    """Return the constants that scale a tensor's channels, as (node, input index)."""
    node = tensor.producer()
    if node is None:
        return ()
    if node.op_type == "LayerNormalization":
        return tuple((node, i) for i in (1, 2) if constant(node.inputs[i]) is not None)
    if node.op_type == "Relu":
        return _linear_makers(node.inputs[0])
    mixed = _moved(tensor).producer()
    if mixed is None or mixed.op_type != "MatMul" or constant(mixed.inputs[1]) is not None:
        return ()
    value = mixed.inputs[1]
    return () if value is None else _linear_makers(_moved(value))


def _linear_makers(value: onnx_ir.Value | None) -> tuple[tuple[onnx_ir.Node, int], ...]:
    """Return a linear layer's weight and bias, if its output has a single consumer."""
    bias = value.producer() if value is not None and len(value.uses()) == 1 else None
    if bias is None or bias.op_type != "Add" or constant(bias.inputs[1]) is None or bias.inputs[0] is None:
        return ()
    product = bias.inputs[0].producer()
    if product is None or product.op_type != "MatMul" or constant(product.inputs[1]) is None:
        return ()
    return (product, 1), (bias, 1)


def _moved(value: onnx_ir.Value) -> onnx_ir.Value:
    """Return the tensor before a chain of reshapes and transposes with single consumers."""
    while (node := value.producer()) is not None and node.op_type in _MOVES_ONLY:
        before = node.inputs[0]
        if before is None or len(before.uses()) != 1:
            return value
        value = before
    return value


def _move(place: _Place, magnitudes: NDArray[np.float32], alpha: float) -> None:
    weights = [constant(reader.inputs[1]) for reader in place.readers]
    reached = np.max([np.abs(weight).max(axis=1) for weight in weights if weight is not None], axis=0)
    factors = np.maximum(magnitudes, 1e-5) ** alpha / np.maximum(reached, 1e-5) ** (1 - alpha)
    factors = np.where(magnitudes > 0, factors, 1.0).clip(1e-3, 1e3).astype(np.float32)
    factors /= np.exp(np.log(factors).mean())  # only the ratios matter: a common factor changes both scales
    for maker, index in place.makers:
        weight = constant(maker.inputs[index])
        assert weight is not None
        set_weight(maker, index, weight / factors)
    for reader, weight in zip(place.readers, weights, strict=True):
        assert weight is not None
        set_weight(reader, 1, weight * factors[:, None])
