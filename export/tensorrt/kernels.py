"""Check that the kernels built by a TensorRT compiler compute in the graph's precision.

TensorRT-RTX lists its kernels, with operand types and the ONNX nodes that each covers, at the end of a
verbose log (seen with 1.7). TensorRT gives the same through its engine inspector, as JSON, once a GPU has
loaded the plan; the parser follows its documentation and published listings. TensorRT 10 gives a tensor one
field ``Format/Datatype``, and may list constants among a kernel's inputs; 11 has ``Format`` and ``DataType``.
In a strongly typed network, types should follow the graph.
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
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), "
    r"StreamId: \d+,.*?Metadata: ?(?P<nodes>.*)$"
)
_ASIDE = frozenset({"Reshape", "Transpose", "Cast"})
"""Operators skipped between a DequantizeLinear and its product. The Cast follows a Q/DQ pair kept in FP32
because its scale is below FP16's range."""
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_MULTIPLYING = frozenset(
    {
        "gemm",
        "correlation",
        "runtime_fusion",
        "fusion",
        "MatrixMultiply",
        "CaskConvActPool",
        "CaskConvolution",
        "CaskGemmConvolution",
        "CaskGemmMatrixMultiply",
    }
)
_PRODUCT_NAME = re.compile(r"mha|gemm|__myl_\w*(?:Fc|Corr)")
"""Names of generated kernels that multiply matrices: ``__myl_FcMulAdd_myl0_25``, ``_gemm_mha_v2_myl0_4``."""

_WORDS = {
    "fp32": "Float",
    "float": "Float",
    "fp16": "Half",
    "half": "Half",
    "bf16": "BFloat16",
    "bfloat16": "BFloat16",
    "int8": "Int8",
    "fp8": "FP8",
}
"""Type names of the engine inspector, alone or in a description such as ``Row major linear FP16 format``."""

_TYPE_FIELDS = frozenset({"datatype", "format/datatype"})
_CONSTANT = re.compile(r"_dconst\b")
_HALF_ACCUMULATOR = re.compile(r"_f16f16_f16f16_")
"""Part of a tactic's name: the types of both operands, then of the result and of the accumulator."""

_NAMES = {
    onnx_ir.DataType.FLOAT: "Float",
    onnx_ir.DataType.FLOAT16: "Half",
    onnx_ir.DataType.BFLOAT16: "BFloat16",
    onnx_ir.DataType.INT8: "Int8",
    onnx_ir.DataType.FLOAT8E4M3FN: "FP8",
}
"""Compiler's names of ONNX types."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Compiled kernel, with the compiler's type names, and the ONNX names of its ``nodes``.

    ``tactic`` names the implementation that the compiler chose; empty if it does not say.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tactic: str = ""

    @property
    def multiplies(self) -> bool:
        """True if the kernel multiplies matrices; others may name a product whose operands they move."""
        return self.kind in _MULTIPLYING or _PRODUCT_NAME.search(self.name) is not None


def kernels_from_log(messages: Iterable[str]) -> list[Kernel]:
    """Parse the kernels listed in a verbose build log; empty if there is no listing."""
    listing = [message for message in messages if message.startswith("Layers:")]
    lines = (line for message in listing for line in message.splitlines())
    return [_kernel(match) for line in lines if (match := _LINE.match(line))]


def kernels_from_inspection(text: str) -> list[Kernel]:
    """Parse the kernels in the JSON of TensorRT's engine inspector; entries with only a name are skipped."""
    layers = json.loads(text).get("Layers", [])
    return [
        Kernel(
            name=str(layer.get("Name", "")),
            kind=str(layer.get("LayerType", "")),
            inputs=_types(layer.get("Inputs", [])),
            outputs=_types(layer.get("Outputs", [])),
            nodes=tuple(_NODE.findall(str(layer.get("Metadata", "")))),
            tactic=str(layer.get("TacticName", "")),
        )
        for layer in layers
        if isinstance(layer, dict)
    ]


def _types(tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the types of a kernel's operands; constants are left out."""
    return tuple(_type(t) for t in tensors if _CONSTANT.search(str(t.get("Name", ""))) is None)


def _type(tensor: Mapping[str, Any]) -> str:
    phrase = next((str(value) for key, value in tensor.items() if key.lower() in _TYPE_FIELDS), "")
    return next((_WORDS[word] for word in phrase.lower().split() if word in _WORDS), phrase)


def _kernel(match: re.Match[str]) -> Kernel:
    return Kernel(
        name=match["name"],
        kind=match["kind"],
        inputs=tuple(_DATATYPE.findall(match["inputs"])),
        outputs=tuple(_DATATYPE.findall(match["outputs"])),
        nodes=tuple(_NODE.findall(match["nodes"])),
        tactic=match["tactic"],
    )


def expected_types(model: onnx_ir.Model) -> dict[str, str]:
    """Return the type in which each matrix product must be computed, by node name."""
    return {str(node.name): _operand_type(node) for node in products(model)}


def _operand_type(node: onnx_ir.Node) -> str:
    """Return the quantized type if both operands are dequantized just before, or else their own type."""
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
    """Return the type a tensor was dequantized from, ignoring moves and casts, or else its own type."""
    source, producer = value, value.producer()
    while producer is not None and producer.op_type in _ASIDE and producer.inputs[0]:
        source = producer.inputs[0]
        producer = source.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        return producer.inputs[0].dtype
    return value.dtype


def summary_from_kernels(model: onnx_ir.Model, kernels: Sequence[Kernel]) -> KernelSummary:
    """Check the built kernels against the graph and summarise them.

    Raises:
        ExportError: a kernel computes a matrix product in another type than the graph, or no kernel names a
            product, so that its type is unknown.
    """
    expected = expected_types(model)
    found: Counter[str] = Counter()
    tactics: Counter[str] = Counter()
    unseen = []
    for name, dtype in expected.items():
        covering = [kernel for kernel in kernels if kernel.multiplies and name in kernel.nodes]
        if not covering:
            unseen.append(name)
            continue
        _require_type(name, dtype, covering)
        found[dtype] += 1
        tactics.update({kernel.tactic for kernel in covering if kernel.tactic})
    if expected and not found:
        raise ExportError(
            f"None of the {len(kernels)} kernels listed by the compiler names a matrix product of the graph, "
            "so their precision cannot be checked. Use a release that lists them."
        )
    return KernelSummary(
        n_kernels=len(kernels),
        products=dict(found),
        n_fused_attention=len(_fused_attention(model, kernels, expected)),
        unseen=tuple(unseen),
        tactics=dict(tactics),
        n_half_accumulators=sum(n for tactic, n in tactics.items() if _HALF_ACCUMULATOR.search(tactic)),
    )


def _require_type(name: str, dtype: str, kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        if dtype not in kernel.inputs or (dtype != "Float" and "Float" in kernel.inputs):
            raise ExportError(
                f"Matrix product {name!r} should compute in {dtype}, but kernel {kernel.name!r} takes "
                f"{list(kernel.inputs)}: the compiler did not keep the graph's precision."
            )


def _fused_attention(
    model: onnx_ir.Model, kernels: Sequence[Kernel], expected: Mapping[str, str]
) -> set[str]:
    """Return the Softmax nodes whose kernel also contains the two attention products."""
    softmax = {str(node.name) for node in model.graph if node.op_type == "Softmax"}
    fused = (
        softmax.intersection(kernel.nodes)
        for kernel in kernels
        if len(expected.keys() & set(kernel.nodes)) == 2
    )
    return set().union(*fused)
