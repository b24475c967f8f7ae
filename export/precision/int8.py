"""FP32 graph → INT8 graph: static Q/DQ around every matrix product.

Scales are constants, so that a row alone and in any batch are the same row. Weights are symmetric, one
scale for each output channel, and rounded so that their errors cancel on the calibration inputs.
Activations have one scale for each tensor, measured on calibration batches. One Q/DQ pair stands at a
tensor, however many products read it. Products of two activations (attention) are quantised too: the
engines then fuse a whole attention in int8.

The recipe is one for all engines; only how an activation is *encoded* differs, since each engine has a fast
path for another form. For OpenVINO, the attention of texts is written so that its sums are exact, and in few
nodes (docs/decisions/0007-int8-recipe.md).
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
    "Measured",
    "int8_from_onnx",
    "recipe_for",
]

_UINT8, _INT8 = onnx_ir.DataType.UINT8, onnx_ir.DataType.INT8


class GraphTarget(str, Enum):
    """The engine that a graph is made for; every engine but TensorRT reads every form."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"


class ActivationEncoding(str, Enum):
    """How activations become 8-bit numbers.

    ``UINT8`` covers what the tensor takes, zero point anywhere. ``INT8`` is symmetric, zero point 0.
    ``INT8_OR_UINT8`` is symmetric too, but a tensor without negative values takes uint8 with zero point 0.
    """

    UINT8 = "uint8"
    INT8 = "int8"
    INT8_OR_UINT8 = "int8-or-uint8"


ENCODINGS: Mapping[GraphTarget, ActivationEncoding] = {
    GraphTarget.ONNXRUNTIME: ActivationEncoding.UINT8,
    GraphTarget.OPENVINO: ActivationEncoding.INT8_OR_UINT8,
    GraphTarget.TENSORRT: ActivationEncoding.INT8,
}
"""What each engine runs fastest; TensorRT reads nothing else."""

LARGEST_CODES: Mapping[GraphTarget, int] = {
    GraphTarget.ONNXRUNTIME: PORTABLE_CODE,
    GraphTarget.OPENVINO: FULL_CODE,
    GraphTarget.TENSORRT: FULL_CODE,
}
"""Largest magnitude of a weight's code. ONNX Runtime runs the graph on CPUs that saturate in 16 bits too."""


@dataclass(frozen=True, slots=True)
class Int8Recipe:
    """How to quantise.

    Attributes:
        target: Which engine's form the graph takes.
        method: Where activations are clipped.
        percentile: Of magnitudes, for ``ClipMethod.PERCENTILE``.
        kept: Names of matrix products that stay FP32.
        smooth: SmoothQuant's alpha; ``None`` moves no outliers.
        table: How the token table is stored.
        rounding: How weights are rounded.
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
            raise ExportError(f"Percentile {self.percentile} clips too much; expected over 50, up to 100.")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ExportError(f"Smoothing by {self.smooth} is not possible; expected between 0 and 1.")
        if self.target is GraphTarget.TENSORRT and self.table is EmbeddingTable.INT8:
            raise ExportError("TensorRT looks up no int8 rows; pass table=EmbeddingTable.FP16 or FP32.")

    @property
    def encoding(self) -> ActivationEncoding:
        """Form of the target's activation codes."""
        return ENCODINGS[self.target]

    @property
    def largest_code(self) -> int:
        """Largest magnitude of a weight's code, for the target."""
        return LARGEST_CODES[self.target]


def recipe_for(target: GraphTarget) -> Int8Recipe:
    """The default recipe of an engine."""
    table = EmbeddingTable.FP16 if target is GraphTarget.TENSORRT else EmbeddingTable.INT8
    # Where weights have all 8 bits, rounding to the nearest loses less than activations do.
    rounding = Rounding.COMPENSATED if target is GraphTarget.ONNXRUNTIME else Rounding.NEAREST
    return Int8Recipe(target=target, table=table, rounding=rounding)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Results of calibration, which hold whatever products are kept.

    Attributes:
        extents: Range that is kept of each activation, by the tensor's name.
        weights: Rounded weights, by the product's name.
    """

    extents: Mapping[str, ClipRange]
    weights: Mapping[str, RoundedWeight]


@dataclass(frozen=True, slots=True)
class Int8Report:
    """Summary of a quantised graph.

    Attributes:
        share_int8: Of the multiply–adds of all matrix products, at ``matrix_products.NOMINAL_SIZES``.
        n_int8: Products in INT8.
        kept: Products in FP32.
        n_smoothed: Tensors whose outliers were moved.
        measured: Ranges and rounded weights, to quantise the tower again without measuring anew.
    """

    recipe: Int8Recipe
    share_int8: float
    n_int8: int
    kept: tuple[str, ...]
    n_smoothed: int
    measured: Measured = field(repr=False, compare=False)


def int8_from_onnx(
    source: Path,
    target: Path,
    *,
    data_name: str,
    calibration: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Int8Recipe,
    measured: Measured | None = None,
) -> Int8Report:
    """Quantise a tower's FP32 graph.

    Args:
        source: Graph written by ``onnx_from_tower``.
        target: ONNX file to write; large weights go beside it as ``data_name``.
        calibration: Batches of real inputs by name, see ``export.precision.calibration``.
        measured: From an earlier report of the same tower, clipping, smoothing and rounding that kept no
            product that is quantised now; measured here if ``None``.

    Raises:
        ExportError: no calibration batches, a name in ``recipe.kept`` that is no matrix product, or an
            activation that is not finite.
    """
    model = onnx_ir.load(source)
    operations = {str(node.name): n for node, n in operations_by_product(model).items()}
    if unknown := sorted(set(recipe.kept) - set(operations)):
        raise ExportError(f"{unknown[0]!r} is no matrix product of {source.name}; it has {len(operations)}.")
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
        measured = Measured(extents, weights)
    for value in activations:
        _quantise_activation(model.graph, value, activations[value], measured.extents, recipe.encoding)
    for node in chosen:
        _quantise_weight(model.graph, node, measured.weights)
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
    """Computed tensors that products read, and where."""
    found: dict[onnx_ir.Value, Reads] = {}
    for node in chosen:
        for i, value in enumerate(node.inputs[:2]):
            if value is not None and constant(value) is None:
                found.setdefault(value, []).append((node, i))
    return found


def _quantise_activation(
    graph: onnx_ir.Graph,
    value: onnx_ir.Value,
    reads: Reads,
    extents: Mapping[str, ClipRange],
    encoding: ActivationEncoding,
) -> None:
    """Put one Q/DQ pair between a tensor and the products that read it."""
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
        quantise = onnx_ir.node("QuantizeLinear", [value, *steps], name=f"{name}/QuantizeLinear")
        codes = quantise.outputs[0]
        codes.name, codes.shape = f"{name}/codes", value.shape
        codes.dtype = onnx_ir.DataType.from_numpy(zero.dtype)
        nodes.append(quantise)
    dequantise = onnx_ir.node("DequantizeLinear", [codes, *steps], name=f"{name}/DequantizeLinear")
    nodes.append(dequantise)
    result = float_like(dequantise, f"{name}/quantised", value.shape)
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    for node, i in reads:
        node.replace_input_with(i, result)


def _pixel_codes(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """The uint8 tensor that a tensor is made of by subtracting ``PIXEL_CENTRE``: it is quantised already."""
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
    """The step between two codes, and the code of 0."""
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
    """Round the weights of all products, by the product's name."""
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
    """Give rows of an activation as they are after quantising; pixels are exact."""
    if _pixel_codes(value) is not None:
        return lambda rows: rows
    scale, zero = _scale_and_zero(extents[str(value.name)], encoding)
    limits, offset = np.iinfo(zero.dtype), np.float32(zero)

    def seen(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        codes = np.clip(np.rint(rows / scale) + offset, limits.min, limits.max)
        dequantised: NDArray[np.float32] = ((codes - offset) * scale).astype(np.float32)
        return dequantised

    return seen


def _rounded(
    node: onnx_ir.Node, recipe: Int8Recipe, moments: NDArray[np.float64] | None = None
) -> RoundedWeight:
    weight = constant(node.inputs[1])
    assert weight is not None
    return rounded_weight(weight, _output_axis(node), largest_code=recipe.largest_code, moments=moments)


def _output_axis(node: onnx_ir.Node) -> int:
    """Axis of a product's weight that its output channels lie on."""
    by_row = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
    return 0 if by_row else -1


def _quantise_weight(graph: onnx_ir.Graph, node: onnx_ir.Node, weights: Mapping[str, RoundedWeight]) -> None:
    """Store a product's weights as int8, one scale for each output channel."""
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
    dequantise = onnx_ir.node(
        "DequantizeLinear",
        inputs,
        attributes={"axis": _output_axis(node) % weight.ndim},
        name=f"{node.name}/weight",
    )
    graph.insert_before(node, dequantise)
    node.replace_input_with(1, float_like(dequantise, f"{node.name}/weight", weight.shape))
