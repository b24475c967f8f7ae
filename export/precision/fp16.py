"""Convert an FP32 graph to mixed FP16 or BF16, with every node in 16 bits whose values fit.

Types are explicit, so that a strongly typed engine (TensorRT) has no choice: each node is entirely 16-bit or
entirely FP32, with a Cast between the two. These nodes stay FP32:

- in FP16 only, nodes with an activation within a factor of two of its maximum (``LARGEST_ACTIVATION``),
- in FP16 only, nodes with a constant outside its range (the epsilon of 1e-12 in a norm),
- sums over an axis and norms, since engines choose the accumulator by the type,
- nodes before the first product (pixel normalisation, mask) and after the last (the final L2 norm):
  they cost nothing, and their rounding would affect every component.

BF16 has FP32's range, so it needs no measured activations; it has 8 bits of precision where FP16 has 11.

LayerNormalization and Softmax have 16-bit inputs and outputs but compute their statistics in FP32
(``stash_type`` requires it for the former; all supported engines do it for the latter), and so do
``SkipLayerNormalization`` and ``MultiHeadAttention`` of ONNX Runtime.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import onnx_ir

from export.graphs.exact_pixels import EXACT
from export.graphs.files import bytes_on_disk, save_graph
from export.graphs.float_types import float_values, halve
from export.graphs.matrix_products import PRODUCTS, operations_by_product
from export.precision.tensorrt_form import QUANTIZERS, suit_tensorrt
from runtime.errors import ExportError

__all__ = [
    "LARGEST_ACTIVATION",
    "Fp16Report",
    "HalfReport",
    "KeptNode",
    "Reason",
    "bfloat16_from_onnx",
    "fp16_from_onnx",
    "halve_model",
]

LARGEST_ACTIVATION = 65_504 / 2
"""Maximum measured magnitude of an FP16 activation, with a factor of 2 for unseen inputs. The attention
mask's -30,000 is below it."""

_CLAMP = 64_504.0
"""Limit to which transformers' ``M2M100EncoderLayer`` clamps its output, only when computing in FP16."""

_BFLOAT_CONV_OPSET = 22
"""First ONNX opset whose Conv has BF16; in FP32, the patch embedding would cost a third of a tower's time."""

_CLAMPED_TOWERS = {("nllb-clip", "text")}
_BLOCK = re.compile(r"encoder\.blocks\.\d+")
_SUMS = frozenset(
    {
        "CumSum",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    }
)
_FLOAT, _HALF, _BFLOAT = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16


class Reason(str, Enum):
    """Reason for keeping a node in FP32."""

    RANGE = "range"
    CONSTANT = "constant"
    SUM = "sum"
    BEFORE = "before the first product"
    AFTER = "after the last product"


@dataclass(frozen=True, slots=True)
class KeptNode:
    """Node kept in FP32; ``magnitude`` is its largest measured activation, 0 if none was measured."""

    name: str
    op_type: str
    reason: Reason
    magnitude: float


@dataclass(frozen=True, slots=True)
class HalfReport:
    """Summary of a 16-bit graph; ``half_share`` is the share of the products' multiply–adds in 16 bits."""

    kept: tuple[KeptNode, ...]
    n_half: int
    n_clamps: int
    half_share: float
    source_bytes: int
    target_bytes: int

    @property
    def kept_products(self) -> tuple[KeptNode, ...]:
        """Matrix products kept in FP32."""
        return tuple(node for node in self.kept if node.op_type in PRODUCTS)


def fp16_from_onnx(source: Path, target: Path, *, data_name: str, ranges: Mapping[str, float]) -> HalfReport:
    """Convert an FP32 graph, with or without Q/DQ nodes, to FP16; inputs and outputs keep their types.

    Args:
        source: ONNX file; float weights become FP16, quantized weights are unchanged.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
        ranges: Largest magnitude of each float activation, from ``activation_ranges``. Outputs of Q/DQ nodes
            take the range of the tensor that they quantize.

    Raises:
        ExportError: the ranges belong to another graph.
    """
    model = onnx_ir.load(source)
    if any(node.op_type in QUANTIZERS for node in model.graph):
        ranges = {**ranges, **suit_tensorrt(model)}
    if model.metadata_props.get("babeltower.precision") != "int8":
        model.metadata_props["babeltower.precision"] = "fp16"
    return _converted(model, source, target, data_name=data_name, ranges=ranges, dtype=_HALF)


def bfloat16_from_onnx(source: Path, target: Path, *, data_name: str) -> HalfReport:
    """Convert an FP32 graph to one that computes in BF16; inputs and outputs keep their types.

    Args:
        source: ONNX file; float weights become BF16.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
    """
    model = onnx_ir.load(source)
    model.metadata_props["babeltower.precision"] = "bf16"
    return _converted(model, source, target, data_name=data_name, ranges={}, dtype=_BFLOAT)


def _converted(
    model: onnx_ir.Model,
    source: Path,
    target: Path,
    *,
    data_name: str,
    ranges: Mapping[str, float],
    dtype: onnx_ir.DataType,
) -> HalfReport:
    operations = operations_by_product(model)
    halved = halve_model(model, ranges, dtype)
    save_graph(model, target, data_name=data_name)
    half = sum(count for node, count in operations.items() if node not in halved.kept)
    return HalfReport(
        kept=tuple(halved.kept.values()),
        n_half=halved.n_half,
        n_clamps=halved.n_clamps,
        half_share=half / max(1, sum(operations.values())),
        source_bytes=bytes_on_disk(source),
        target_bytes=bytes_on_disk(target),
    )


@dataclass(frozen=True, slots=True)
class Fp16Report:
    """Result of ``halve_model``: the nodes kept in FP32, and counts of the others."""

    kept: Mapping[onnx_ir.Node, KeptNode]
    n_half: int
    n_clamps: int


def halve_model(
    model: onnx_ir.Model, ranges: Mapping[str, float], dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT16
) -> Fp16Report:
    """Select the nodes to keep in FP32 and convert the others, in place; see ``fp16_from_onnx``.

    Args:
        ranges: Largest magnitude of each float activation; not used for ``BFLOAT16``.
        dtype: ``FLOAT16`` or ``BFLOAT16``.
    """
    narrow = dtype is _HALF
    kept = _kept_nodes(model.graph, ranges if narrow else None)
    n_half = sum(bool(float_values(node)) for node in model.graph) - len(kept)
    n_clamps = _restore_clamps(model, kept) if narrow else 0
    halve(model, kept, dtype)
    if dtype is _BFLOAT and any(node.op_type == "Conv" for node in model.graph):
        model.graph.opset_imports[""] = max(_BFLOAT_CONV_OPSET, model.graph.opset_imports[""])
    return Fp16Report(kept, n_half, n_clamps)


def _kept_nodes(graph: onnx_ir.Graph, ranges: Mapping[str, float] | None) -> dict[onnx_ir.Node, KeptNode]:
    """Return the nodes to keep in FP32, in graph order, with the reasons.

    Args:
        ranges: Largest magnitudes, compared with FP16's range; None for a type with FP32's range.
    """
    before, after = _before_products(graph), _after_products(graph)
    kept = {}
    for node in graph:
        floats = float_values(node)
        if not floats:
            continue
        magnitude = 0.0 if ranges is None else max(_magnitude(value, ranges) for value in floats)
        if node in before and EXACT not in node.metadata_props:
            reason = Reason.BEFORE
        elif node in after:
            reason = Reason.AFTER
        elif node.op_type in _SUMS:
            reason = Reason.SUM
        elif magnitude > LARGEST_ACTIVATION:
            reason = Reason.RANGE
        elif ranges is not None and any(map(_unfit, floats)):
            reason = Reason.CONSTANT
        else:
            continue
        kept[node] = KeptNode(str(node.name), node.op_type, reason, magnitude)
    return kept


def _before_products(graph: onnx_ir.Graph) -> set[onnx_ir.Node]:
    """Return the nodes that compute on cast integer inputs, before any product or table lookup."""
    found: set[onnx_ir.Node] = set()
    learned: set[onnx_ir.Node] = set()
    for node in graph:
        sources = {value.producer() for value in node.inputs if value is not None}
        if node.op_type in PRODUCTS | QUANTIZERS or _looks_up(node) or sources & learned:
            learned.add(node)
        elif float_values(node) and (node.op_type == "Cast" or sources & found):
            found.add(node)
    return found


def _looks_up(node: onnx_ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    return table is not None and table.const_value is not None and table.dtype in (_FLOAT, _HALF, _BFLOAT)


def _after_products(graph: onnx_ir.Graph) -> set[onnx_ir.Node]:
    """Return the nodes after the last product: no product depends on them."""
    before: set[onnx_ir.Node] = set()
    for node in reversed(graph):
        if node.op_type in PRODUCTS or any(reader in before for reader in node.successors()):
            before.add(node)
    return {node for node in graph if node not in before}


def _magnitude(value: onnx_ir.Value, ranges: Mapping[str, float]) -> float:
    """Return the largest magnitude of a tensor; Q/DQ outputs take that of their input."""
    if value.const_value is not None or value.dtype in (_HALF, _BFLOAT):
        return 0.0
    producer = value.producer()
    if str(value.name) in ranges:
        return ranges[str(value.name)]
    if producer is not None and producer.op_type in QUANTIZERS and producer.inputs[0] is not None:
        return _magnitude(producer.inputs[0], ranges)
    raise ExportError(
        f"The ranges do not include activation {value.name!r}: they were measured on another graph. Measure "
        "the graph to be converted."
    )


def _unfit(value: onnx_ir.Value) -> bool:
    """Return True for a constant outside FP16's range: too large, or a scalar below the smallest normal."""
    if value.const_value is None:
        return False
    numbers = np.abs(value.const_value.numpy())
    if numbers.size == 1 and 0 < numbers.item() < np.finfo(np.float16).tiny:
        return True
    return bool(numbers.max(initial=0) > np.finfo(np.float16).max)


def _restore_clamps(model: onnx_ir.Model, kept: Collection[onnx_ir.Node]) -> int:
    """Clamp the output of each FP16 encoder layer as PyTorch does; return the number of layers."""
    facts = model.metadata_props
    if (facts.get("babeltower.family"), facts.get("babeltower.modality")) not in _CLAMPED_TOWERS:
        return 0
    ends = {}
    for node in model.graph:
        block = str(node.name).partition("/")[0]
        if node.op_type == "Add" and _BLOCK.fullmatch(block):
            ends[block] = node
    halves = [node for node in ends.values() if node not in kept]
    if halves:
        limits = [_scalar(model.graph, "lowest_fp16", -_CLAMP), _scalar(model.graph, "largest_fp16", _CLAMP)]
    for node in halves:
        _clamp(model.graph, node, limits)
    return len(halves)


def _scalar(graph: onnx_ir.Graph, name: str, number: float) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(np.float32(number), name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(_FLOAT), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _clamp(graph: onnx_ir.Graph, node: onnx_ir.Node, limits: Sequence[onnx_ir.Value]) -> None:
    """Insert a Clip between a node and all its consumers."""
    (end,) = node.outputs
    clip = onnx_ir.node("Clip", [end, *limits], name=f"{str(node.name).partition('/')[0]}/Clip")
    (clamped,) = clip.outputs
    clamped.name, clamped.shape, clamped.type = f"{end.name}_clamped", end.shape, end.type
    end.replace_all_uses_with(clamped)
    clip.replace_input_with(0, end)
    graph.insert_after(node, clip)
