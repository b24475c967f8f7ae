"""Convert an FP32 graph to INT8 with static Q/DQ pairs around every matrix product.

Scales are constants, so that a row gives the same result alone and in any batch. Weights are symmetric, with
one scale per output channel, and rounded so that their errors cancel on the calibration inputs. Activations
have one scale per tensor, measured on calibration batches, and one Q/DQ pair shared by all products that use
the tensor. Products of two activations (attention) are quantized too, so that engines can fuse the whole
attention in int8.

The recipe is the same for all engines, except for the *encoding* of activations and the range of weight
codes, since engines differ in their fast paths. For OpenVINO, text attention is rewritten with exact sums and
fewer nodes (docs/decisions/0007-int8-recipe.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight, constant, drop_unused, float_like
from export.graphs.embedding_table import EmbeddingTable, shrink_table
from export.graphs.exact_softmax import sum_exactly
from export.graphs.files import save_graph
from export.graphs.folding import PIXEL_CENTRE, fold
from export.graphs.matrix_products import operations_by_product, products
from export.graphs.packed_attention import pack_attention
from export.precision.clipping import ClipMethod, ClipRange, clip_extents
from export.precision.input_moments import Seen, input_moments
from export.precision.smoothing import smooth
from export.precision.weight_rounding import FULL_CODE, PORTABLE_CODE, RoundedWeight, Rounding, rounded_weight
from runtime.errors import ExportError

__all__ = [
    "ActivationEncoding",
    "GraphTarget",
    "Int8Recipe",
    "Int8Report",
    "MeasuredInputs",
    "int8_from_onnx",
    "recipe_for",
]

_UINT8, _INT8 = onnx_ir.DataType.UINT8, onnx_ir.DataType.INT8


class GraphTarget(str, Enum):
    """Engine that a graph is optimised for; every engine except TensorRT can run all graphs."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"


class ActivationEncoding(str, Enum):
    """8-bit encoding of activations.

    ``UINT8`` is asymmetric, with any zero point. ``INT8`` is symmetric, with zero point 0. ``INT8_OR_UINT8``
    is symmetric too, but a tensor without negative values is uint8 with zero point 0.
    """

    UINT8 = "uint8"
    INT8 = "int8"
    INT8_OR_UINT8 = "int8-or-uint8"


ENCODINGS: Mapping[GraphTarget, ActivationEncoding] = {
    GraphTarget.ONNXRUNTIME: ActivationEncoding.UINT8,
    GraphTarget.OPENVINO: ActivationEncoding.INT8_OR_UINT8,
    GraphTarget.TENSORRT: ActivationEncoding.INT8,
}
"""Fastest encoding for each engine; TensorRT supports no other."""

LARGEST_CODES: Mapping[GraphTarget, int] = {
    GraphTarget.ONNXRUNTIME: PORTABLE_CODE,
    GraphTarget.OPENVINO: FULL_CODE,
    GraphTarget.TENSORRT: FULL_CODE,
}
"""Largest magnitude of a weight code. ONNX Runtime's allows for CPUs that saturate at 16 bits."""


@dataclass(frozen=True, slots=True)
class Int8Recipe:
    """Quantization settings.

    Attributes:
        target: Engine that the graph is optimised for.
        method: Clipping method of activations.
        percentile: Percentile of magnitudes, for ``ClipMethod.PERCENTILE``.
        kept: Names of matrix products to keep in FP32.
        smooth: SmoothQuant's alpha; None disables smoothing.
        table: Storage type of the token embedding table.
        rounding: Rounding method of weights.
    """

    target: GraphTarget = GraphTarget.ONNXRUNTIME
    method: ClipMethod = ClipMethod.MSE
    percentile: float = 99.99
    kept: tuple[str, ...] = ()
    smooth: float | None = None
    table: EmbeddingTable = EmbeddingTable.INT8
    rounding: Rounding = Rounding.COMPENSATED

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ExportError(f"Percentile {self.percentile} is out of range; expected over 50, up to 100.")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ExportError(f"Smoothing alpha {self.smooth} is out of range; expected between 0 and 1.")
        if self.target is GraphTarget.TENSORRT and self.table is EmbeddingTable.INT8:
            raise ExportError("TensorRT has no int8 table lookup; pass table=EmbeddingTable.FP16 or FP32.")

    @property
    def encoding(self) -> ActivationEncoding:
        """Activation encoding for the target."""
        return ENCODINGS[self.target]

    @property
    def largest_code(self) -> int:
        """Largest magnitude of a weight code for the target."""
        return LARGEST_CODES[self.target]


def recipe_for(target: GraphTarget) -> Int8Recipe:
    """Return the default recipe of an engine."""
    table = EmbeddingTable.FP16 if target is GraphTarget.TENSORRT else EmbeddingTable.INT8
    # With full 8-bit weights, rounding to nearest loses less accuracy than the activations do.
    rounding = Rounding.COMPENSATED if target is GraphTarget.ONNXRUNTIME else Rounding.NEAREST
    return Int8Recipe(target=target, table=table, rounding=rounding)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredInputs:
    """Results of calibration, valid for any choice of products kept in FP32.

    Attributes:
        extents: Clipping range of each activation, by tensor name.
        weights: Rounded weights, by product name.
    """

    extents: Mapping[str, ClipRange]
    weights: Mapping[str, RoundedWeight]


@dataclass(frozen=True, slots=True)
class Int8Report:
    """Summary of a quantized graph.

    Attributes:
        share_int8: Share of the products' multiply–adds in INT8, at ``matrix_products.NOMINAL_SIZES``.
        n_int8: Number of products in INT8.
        kept: Names of products in FP32.
        n_smoothed: Number of smoothed tensors.
        measured: Ranges and rounded weights, to quantize the tower again without new measurements.
    """

    recipe: Int8Recipe
    share_int8: float
    n_int8: int
    kept: tuple[str, ...]
    n_smoothed: int
    measured: MeasuredInputs = field(repr=False, compare=False)


def int8_from_onnx(
    source: Path,
    target: Path,
    *,
    data_name: str,
    calibration: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Int8Recipe,
    measured: MeasuredInputs | None = None,
) -> Int8Report:
    """Quantize a tower's FP32 graph.

    Args:
        source: Graph written by ``onnx_from_tower``.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
        calibration: Batches of real inputs by name, see ``export.precision.calibration``.
        measured: Measurements from an earlier report with the same tower, clipping, smoothing and rounding,
            which include all products quantized now; measured here if None.

    Raises:
        ExportError: there are no calibration batches, a name in ``recipe.kept`` is not a matrix product, or
            an activation is not finite.
    """
    model = onnx_ir.load(source)
    operations = {str(node.name): n for node, n in operations_by_product(model).items()}
    if unknown := sorted(set(recipe.kept) - set(operations)):
        raise ExportError(
            f"{unknown[0]!r} is not one of the {len(operations)} matrix products of {source.name}. Use the "
            "node names of the FP32 graph."
        )
    fold(model)
    folder = source.resolve().parent
    n_smoothed = 0
    if recipe.smooth is not None:
        n_smoothed = smooth(model, folder, calibration, alpha=recipe.smooth)
    chosen = [node for node in products(model) if node.name not in recipe.kept]
    activations = _activations(chosen)
    if measured is None:
        extents = clip_extents(
            model,
            folder,
            [str(value.name) for value in activations],
            calibration,
            method=recipe.method,
            percentile=recipe.percentile,
        )
        weights = _rounded_weights(model, folder, activations, extents, calibration, recipe)
        measured = MeasuredInputs(extents, weights)
    for value in activations:
        _quantize_activation(model.graph, value, activations[value], measured.extents, recipe.encoding)
    for node in chosen:
        _quantize_weight(model.graph, node, measured.weights)
    if recipe.target is GraphTarget.OPENVINO:
        sum_exactly(model)
        pack_attention(model)
    shrink_table(model, recipe.table)
    drop_unused(model)
    model.metadata_props["babeltower.precision"] = "int8"
    save_graph(model, target, data_name=data_name)
    names = {str(node.name) for node in chosen}
    return Int8Report(
        recipe=recipe,
        share_int8=sum(operations[name] for name in names) / sum(operations.values()),
        n_int8=len(names),
        kept=tuple(name for name in operations if name not in names),
        n_smoothed=n_smoothed,
        measured=measured,
    )


Reads = list[tuple[onnx_ir.Node, int]]


def _activations(chosen: Sequence[onnx_ir.Node]) -> dict[onnx_ir.Value, Reads]:
    """Return the computed inputs of the products, with their consumers."""
    found: dict[onnx_ir.Value, Reads] = {}
    for node in chosen:
        for i, value in enumerate(node.inputs[:2]):
            if value is not None and constant(value) is None:
                found.setdefault(value, []).append((node, i))
    return found


def _quantize_activation(
    graph: onnx_ir.Graph,
    value: onnx_ir.Value,
    reads: Reads,
    extents: Mapping[str, ClipRange],
    encoding: ActivationEncoding,
) -> None:
    """Insert one Q/DQ pair between a tensor and the products that use it."""
    name = str(value.name)
    codes = _pixel_codes(value)
    producer = value.producer()
    if codes is not None:
        scale, zero = np.float32(1), np.array(PIXEL_CENTRE, np.uint8)
        if encoding is ActivationEncoding.INT8:
            codes, zero = None, np.array(0, np.int8)
    else:
        scale, zero = _scale_and_zero(extents[name], encoding)
    steps = [add_weight(graph, f"{name}/scale", scale), add_weight(graph, f"{name}/zero", zero)]
    nodes = []
    if codes is None:
        quantize = onnx_ir.node("QuantizeLinear", [value, *steps], name=f"{name}/QuantizeLinear")
        codes = quantize.outputs[0]
        codes.name, codes.shape = f"{name}/codes", value.shape
        codes.dtype = onnx_ir.DataType.from_numpy(zero.dtype)
        nodes.append(quantize)
    dequantize = onnx_ir.node("DequantizeLinear", [codes, *steps], name=f"{name}/DequantizeLinear")
    nodes.append(dequantize)
    result = float_like(dequantize, f"{name}/quantized", value.shape)
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    for node, i in reads:
        node.replace_input_with(i, result)


def _pixel_codes(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return the uint8 pixels from which a tensor was computed by subtracting ``PIXEL_CENTRE``, if so.

    Such a tensor is quantized already: the pixels are its codes.
    """
    centred = value.producer()
    if centred is None or centred.op_type != "Sub" or centred.inputs[0] is None:
        return None
    cast, centre = centred.inputs[0].producer(), constant(centred.inputs[1])
    if cast is None or cast.op_type != "Cast" or centre is None or centre.size != 1:
        return None
    codes = cast.inputs[0]
    is_pixels = codes is not None and codes.dtype == _UINT8 and float(centre.reshape(())) == PIXEL_CENTRE
    return codes if is_pixels else None


def _scale_and_zero(extent: ClipRange, encoding: ActivationEncoding) -> tuple[np.float32, NDArray[Any]]:
    """Return the scale and zero point of an activation."""
    # the range always includes 0, so that 0 has an exact code (padding, ReLU)
    if encoding is ActivationEncoding.UINT8:
        low, high = min(extent.low, 0.0), max(extent.high, 0.0)
        scale = (high - low) / 255 or 1.0
        return np.float32(scale), np.array(round(-low / scale), np.uint8)
    if encoding is ActivationEncoding.INT8_OR_UINT8 and extent.low >= 0:
        return np.float32(extent.high / 255 or 1.0), np.array(0, np.uint8)
    return np.float32(extent.magnitude / 127 or 1.0), np.array(0, np.int8)


def _rounded_weights(
    model: onnx_ir.Model,
    folder: Path,
    activations: Mapping[onnx_ir.Value, Reads],
    extents: Mapping[str, ClipRange],
    calibration: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Int8Recipe,
) -> dict[str, RoundedWeight]:
    """Round the weights of all products; by product name."""
    readers = {
        str(value.name): (
            value,
            [node for node, i in reads if i == 0 and constant(node.inputs[1]) is not None],
        )
        for value, reads in activations.items()
    }
    found: dict[str, RoundedWeight] = {}
    seen: dict[str, Seen] = {}
    for name, (value, nodes) in readers.items():
        for node in nodes:
            if recipe.rounding is Rounding.NEAREST or node.op_type == "Conv":
                found[str(node.name)] = _rounded(node, recipe)
            else:
                seen[name] = _codes_as_seen(value, extents, recipe.encoding)
    for name, moments in input_moments(model, folder, seen, calibration):
        for node in readers[name][1]:
            if node.op_type != "Conv":
                found[str(node.name)] = _rounded(node, recipe, moments)
    return found


def _codes_as_seen(
    value: onnx_ir.Value, extents: Mapping[str, ClipRange], encoding: ActivationEncoding
) -> Seen:
    """Return a function that quantizes and dequantizes rows of an activation; pixels are exact."""
    if _pixel_codes(value) is not None:
        return lambda rows: rows
    scale, zero = _scale_and_zero(extents[str(value.name)], encoding)
    limits, offset = np.iinfo(zero.dtype), np.float32(zero)

    def seen(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        codes = np.clip(np.rint(rows / scale) + offset, limits.min, limits.max)
        dequantized: NDArray[np.float32] = ((codes - offset) * scale).astype(np.float32)
        return dequantized

    return seen


def _rounded(
    node: onnx_ir.Node, recipe: Int8Recipe, moments: NDArray[np.float64] | None = None
) -> RoundedWeight:
    weight = constant(node.inputs[1])
    assert weight is not None
    return rounded_weight(weight, _output_axis(node), largest_code=recipe.largest_code, moments=moments)


def _output_axis(node: onnx_ir.Node) -> int:
    """Return the axis of the output channels in a product's weight."""
    by_row = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
    return 0 if by_row else -1


def _quantize_weight(graph: onnx_ir.Graph, node: onnx_ir.Node, weights: Mapping[str, RoundedWeight]) -> None:
    """Store a product's weights as int8 with one scale per output channel."""
    weight = constant(node.inputs[1])
    if weight is None:
        return
    name = str(node.inputs[1].name) if node.inputs[1] is not None else str(node.name)
    rounded = weights[str(node.name)]
    inputs = [
        add_weight(graph, f"{name}/int8", rounded.codes),
        add_weight(graph, f"{name}/scale", rounded.scales),
        add_weight(graph, f"{name}/zero", np.zeros(rounded.scales.size, np.int8)),
    ]
    dequantize = onnx_ir.node(
        "DequantizeLinear",
        inputs,
        attributes={"axis": _output_axis(node) % weight.ndim},
        name=f"{node.name}/weight",
    )
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, float_like(dequantize, f"{node.name}/weight", weight.shape))
