"""What a TensorRT compiler built, read from its own listing: are the kernels of the asked precision?

TensorRT-RTX lists its kernels, with operand types and the ONNX nodes that each covers, at the end of a
verbose log (seen with 1.7). TensorRT tells the same through its engine inspector, as JSON, once a GPU has
loaded the plan; that form is read as its documentation and published listings show it. Types follow the graph
in a strongly typed network; this checks it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir

from export.graphs.matrix_products import products
from runtime.backends.plans import KernelSummary
from runtime.errors import ExportError

__all__ = ["Kernel", "expected_types", "kernels_from_inspection", "kernels_from_log", "summary_from_kernels"]

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, "
    r"StreamId: \d+,.*?Metadata: ?(?P<nodes>.*)$"
)
_ASIDE = frozenset({"Reshape", "Transpose", "Cast"})
"""A scale under FP16's smallest number keeps its Q/DQ pair in FP32, and a cast behind it."""
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_MULTIPLYING = frozenset(
    {
        "gemm",
        "correlation",
        "runtime_fusion",
        "fusion",
        "MatrixMultiply",
        "CaskConvolution",
        "CaskGemmConvolution",
        "CaskGemmMatrixMultiply",
    }
)
_PHRASES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "Int8": "Int8", "INT8": "Int8", "FP8": "FP8"}
"""Types inside an inspector's phrases, such as ``Row major linear FP16 format``."""
_NAMES = {
    onnx_ir.DataType.FLOAT: "Float",
    onnx_ir.DataType.FLOAT16: "Half",
    onnx_ir.DataType.BFLOAT16: "BFloat16",
    onnx_ir.DataType.INT8: "Int8",
    onnx_ir.DataType.FLOAT8E4M3FN: "FP8",
}
"""ONNX types as the compiler writes them."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel; types as the compiler names them, ``nodes`` as the ONNX graph does."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether the kernel multiplies matrices; others may name a product whose operands they move."""
        return self.kind in _MULTIPLYING or "mha" in self.name


def kernels_from_log(messages: Iterable[str]) -> list[Kernel]:
    """Kernels in the listing of a verbose build log; empty if it has none."""
    listing = [message for message in messages if message.startswith("Layers:")]
    lines = (line for message in listing for line in message.splitlines())
    return [_kernel(match) for line in lines if (match := _LINE.match(line))]


def kernels_from_inspection(text: str) -> list[Kernel]:
    """Kernels in the JSON of TensorRT's engine inspector; those that are only named there are left out."""
    layers = json.loads(text).get("Layers", [])
    return [
        Kernel(
            name=str(layer.get("Name", "")),
            kind=str(layer.get("LayerType", "")),
            inputs=_types(layer.get("Inputs", [])),
            outputs=_types(layer.get("Outputs", [])),
            nodes=tuple(_NODE.findall(str(layer.get("Metadata", "")))),
        )
        for layer in layers
        if isinstance(layer, dict)
    ]


def _types(tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(_type(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))) for tensor in tensors)


def _type(phrase: str) -> str:
    return next((name for word, name in _PHRASES.items() if word in phrase.split()), phrase)


def _kernel(match: re.Match[str]) -> Kernel:
    return Kernel(
        name=match["name"],
        kind=match["kind"],
        inputs=tuple(_DATATYPE.findall(match["inputs"])),
        outputs=tuple(_DATATYPE.findall(match["outputs"])),
        nodes=tuple(_NODE.findall(match["nodes"])),
    )


def expected_types(model: onnx_ir.Model) -> dict[str, str]:
    """The type in which a strongly typed engine must multiply, by the name of the matrix product."""
    return {str(node.name): _operand_type(node) for node in products(model)}


def _operand_type(node: onnx_ir.Node) -> str:
    """The quantised type if both operands are dequantised just before, else the operands' own."""
    types = {_stored_type(value) for value in node.inputs[:2] if value is not None}
    if len(types) != 1:
        types = {value.dtype for value in node.inputs[:2] if value is not None}
    dtype = next(iter(types))
    if len(types) != 1 or dtype not in _NAMES:
        raise ExportError(
            f"Product {node.name!r} has operands of types {sorted(map(str, types))}; expected one of "
            f"{sorted(_NAMES.values())} for both."
        )
    return _NAMES[dtype]


def _stored_type(value: onnx_ir.Value) -> onnx_ir.DataType | None:
    """What the tensor was dequantised from, moves and casts aside; its own type if it was not."""
    source, producer = value, value.producer()
    while producer is not None and producer.op_type in _ASIDE and producer.inputs[0]:
        source = producer.inputs[0]
        producer = source.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        return producer.inputs[0].dtype
    return value.dtype


def summary_from_kernels(model: onnx_ir.Model, kernels: Sequence[Kernel]) -> KernelSummary:
    """Hold what was built to the graph.

    Raises:
        ExportError: a matrix product whose kernel computes in another type than the graph says, or no
            kernel names a product, so that nothing shows in which type it computes.
    """
    expected = expected_types(model)
    found: Counter[str] = Counter()
    unseen = []
    for name, dtype in expected.items():
        covering = [kernel for kernel in kernels if kernel.multiplies and name in kernel.nodes]
        if not covering:
            unseen.append(name)
            continue
        _require_type(name, dtype, covering)
        found[dtype] += 1
    if expected and not found:
        raise ExportError(
            f"None of the {len(kernels)} kernels that the compiler listed names a matrix product of the "
            "graph, so that nothing shows in which precision it computes. Use a release that lists them."
        )
    return KernelSummary(
        n_kernels=len(kernels),
        products=dict(found),
        n_fused_attention=len(_fused_attention(model, kernels, expected)),
        unseen=tuple(unseen),
    )


def _require_type(name: str, dtype: str, kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        if dtype not in kernel.inputs or (dtype != "Float" and "Float" in kernel.inputs):
            raise ExportError(
                f"Matrix product {name!r} was to compute in {dtype}, but kernel {kernel.name!r} takes "
                f"{list(kernel.inputs)}: the compiler did not honour the precision."
            )


def _fused_attention(
    model: onnx_ir.Model, kernels: Sequence[Kernel], expected: Mapping[str, str]
) -> set[str]:
    """Softmax nodes whose kernel also holds the products on either side."""
    softmax = {str(node.name) for node in model.graph if node.op_type == "Softmax"}
    fused = (
        softmax.intersection(kernel.nodes)
        for kernel in kernels
        if len(expected.keys() & set(kernel.nodes)) == 2
    )
    return set().union(*fused)
