"""Convert an FP32 graph to FP8 for TensorRT: E4M3 in linear layers and in attention, FP16 elsewhere.

Activations have one scale per tensor (from the measured range), weights one per output channel. Attention's
two products take quantized operands where the compiler has a fused FP8 kernel: heads of a multiple of 32, and
a number of tokens that is known when the plan is built, as in image towers. A product of learned rows stays
FP16, since TensorRT folds it at build time, and so does the patch embedding, whose three input channels no
FP8 kernel supports. FP8 requires opset 19 and a GPU of compute capability 8.9 or newer; on a CPU, ONNX
Runtime runs such a graph only without its extended optimisations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir

from export.graphs.edits import add_weight, constant, drop_unused, float_like
from export.graphs.files import bytes_on_disk, save_graph
from export.graphs.matrix_products import operations_by_product, products
from export.precision.fp16 import KeptNode, halve_model
from export.precision.tensorrt_form import suit_tensorrt
from runtime.errors import ExportError

__all__ = ["LARGEST_E4M3", "Fp8Report", "fp8_from_onnx"]

LARGEST_E4M3 = 448.0
"""Largest finite E4M3 value."""

_HEAD_MULTIPLE = 32
"""Divisor of the width of heads, and least number of tokens: an FP8 tensor core instruction multiplies 32
values at a time."""

_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
_E4M3 = onnx_ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True, slots=True)
class Fp8Report:
    """Summary of an FP8 graph; ``share_fp8`` is the share of the products' multiply–adds in FP8."""

    share_fp8: float
    n_fp8: int
    kept: tuple[KeptNode, ...]
    opset: int
    source_bytes: int
    target_bytes: int


def fp8_from_onnx(source: Path, target: Path, *, data_name: str, ranges: Mapping[str, float]) -> Fp8Report:
    """Quantize every linear layer and attention's products to E4M3, and convert the rest to FP16.

    Args:
        source: FP32 ONNX file.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
        ranges: Largest magnitude of each float activation, from ``activation_ranges``.

    Raises:
        ExportError: the ranges belong to another graph, or the graph has no linear layer.
    """
    model = onnx_ir.load(source)
    operations = operations_by_product(model)
    linear = [node for node in products(model) if _is_linear(node)]
    attention = [node for node in products(model) if _is_fused_attention(node)]
    if not linear:
        raise ExportError(f"{source} has no linear layer to convert to FP8.")
    suit_tensorrt(model)
    quantized: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in linear:
        _quantize_input(model.graph, node, 0, ranges, quantized)
        _quantize_weight(model.graph, node)
    for node in attention:
        for index in range(2):
            _quantize_input(model.graph, node, index, ranges, quantized)
    drop_unused(model)
    halved = halve_model(model, ranges)
    model.metadata_props["babeltower.precision"] = "fp8"
    save_graph(model, target, data_name=data_name)
    return Fp8Report(
        share_fp8=sum(operations[node] for node in (*linear, *attention)) / sum(operations.values()),
        n_fp8=len(linear) + len(attention),
        kept=tuple(halved.kept.values()),
        opset=model.opset_imports[""],
        source_bytes=bytes_on_disk(source),
        target_bytes=bytes_on_disk(target),
    )


def _is_linear(node: onnx_ir.Node) -> bool:
    is_product = node.op_type in ("MatMul", "Gemm") and constant(node.inputs[1]) is not None
    return is_product and not _is_learned(node.inputs[0])


def _is_fused_attention(node: onnx_ir.Node) -> bool:
    """Return True for a product of two activations that TensorRT-RTX 1.7 fuses with its softmax in FP8.

    It did for heads of 32 and 64 and 50 tokens or more, with and without a mask; not for heads of 16, for 16
    tokens, a dynamic length, or pooling with one query. Separate FP8 kernels cost more than a fused FP16 one.
    """
    left, right = node.inputs[:2]
    if node.op_type != "MatMul" or left is None or constant(left) is not None or constant(right) is not None:
        return False
    scores = left if _maker(left) == "Softmax" else node.outputs[0]
    heads = node.outputs[0] if scores is left else left
    if scores.shape is None or heads.shape is None:
        return False
    head, n_queries = heads.shape[-1], scores.shape[-2]
    if not isinstance(head, int) or not isinstance(n_queries, int):
        return False
    return head % _HEAD_MULTIPLE == 0 and n_queries >= _HEAD_MULTIPLE


def _maker(value: onnx_ir.Value) -> str:
    producer = value.producer()
    return "" if producer is None else producer.op_type


def _is_learned(rows: onnx_ir.Value | None) -> bool:
    """Return True for rows that do not depend on the input (SigLIP's pooling query).

    TensorRT folds their product at build time, in FP16.
    """
    expand = None if rows is None else rows.producer()
    return expand is not None and expand.op_type == "Expand" and constant(expand.inputs[0]) is not None


def _quantize_input(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    index: int,
    ranges: Mapping[str, float],
    quantized: dict[onnx_ir.Value, onnx_ir.Value],
) -> None:
    """Insert one Q/DQ pair per tensor, shared by all products that use it."""
    value = node.inputs[index]
    assert value is not None
    if value not in quantized:
        name = str(value.name)
        if name not in ranges:
            raise ExportError(
                f"The ranges do not include activation {name!r}: they were measured on another graph. "
                "Measure the graph to be converted."
            )
        # scales are stored as FP16 later, so they must not become subnormal
        scale = np.float32(max(ranges[name] / LARGEST_E4M3, _SMALLEST_SCALE))
        steps = [add_weight(graph, f"{name}/scale", scale), _zeros(graph, f"{name}/zero", ())]
        quantize = onnx_ir.node("QuantizeLinear", [value, *steps], name=f"{name}/QuantizeLinear")
        codes = quantize.outputs[0]
        codes.name, codes.shape, codes.dtype = f"{name}/codes", value.shape, _E4M3
        dequantize = onnx_ir.node("DequantizeLinear", [codes, *steps], name=f"{name}/DequantizeLinear")
        quantized[value] = float_like(dequantize, f"{name}/quantized", _dims(value))
        graph.insert_before(node, [quantize, dequantize])
    node.replace_input_with(index, quantized[value])


def _quantize_weight(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    weight = constant(node.inputs[1])
    assert weight is not None
    axis = 0 if node.attributes.get_int("transB", 0) else 1
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scales = np.where(largest > 0, np.maximum(largest / LARGEST_E4M3, _SMALLEST_SCALE), 1).astype(np.float32)
    codes = np.clip(weight / scales, -LARGEST_E4M3, LARGEST_E4M3).astype(_E4M3.numpy())
    name = f"{node.name}/weight"
    inputs = [
        add_weight(graph, f"{name}/e4m3", codes),
        add_weight(graph, f"{name}/scale", scales.ravel()),
        _zeros(graph, f"{name}/zero", scales.shape[axis : axis + 1]),
    ]
    dequantize = onnx_ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=name)
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, float_like(dequantize, name, weight.shape))


def _zeros(graph: onnx_ir.Graph, name: str, shape: tuple[int, ...]) -> onnx_ir.Value:
    return add_weight(graph, name, np.zeros(shape, _E4M3.numpy()))


def _dims(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    return None if value.shape is None else onnx_ir.Shape(list(value.shape))
