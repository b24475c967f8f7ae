"""Convert an FP32 graph to the fused graphs for ONNX Runtime on CUDA, in FP32, FP16 or BF16."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
from numpy.typing import NDArray

from export.graphs.cuda_form import CudaFormReport, suit_cuda
from export.graphs.files import save_graph
from export.graphs.fused_attention import Projections
from export.graphs.spelled_packing import spell_out_packing
from export.precision.activation_ranges import activation_ranges
from export.precision.fp16 import HalfReport, bfloat16_from_onnx, fp16_from_onnx
from runtime.errors import ExportError
from runtime.manifest import Precision
from runtime.preprocessing.buckets import PACKED_TEXT

__all__ = ["CudaReport", "cuda_from_onnx", "require_packs"]

Batches = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class CudaReport:
    """Summary of a graph for CUDA; ``half`` is None in FP32."""

    form: CudaFormReport
    half: HalfReport | None


def cuda_from_onnx(
    source: Path,
    target: Path,
    *,
    data_name: str,
    precision: Precision,
    batches: Callable[[], Batches] | None = None,
    projections: Projections = Projections.SEPARATE,
    packed_text: bool = False,
) -> CudaReport:
    """Fuse an exported FP32 graph for CUDA, and convert it to the precision.

    Args:
        source: FP32 ONNX file.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        batches: Calibration inputs, on which the fused graph's activations are measured; FP16 only.
        packed_text: Compute a text tower without padding.

    Raises:
        ExportError: another precision, FP16 without batches, BF16 of packed text, or a node that a GPU cannot
            run alone.
    """
    if packed_text:
        require_packs(precision)
    model = onnx_ir.load(source)
    form = suit_cuda(model, projections=projections, packed_text=packed_text)
    model.metadata_props["babeltower.form"] = "cuda"
    if packed_text:
        model.metadata_props[PACKED_TEXT] = "1"
    if precision is Precision.FP32:
        save_graph(model, target, data_name=data_name)
        return CudaReport(form, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fused = Path(folder) / "model.onnx"
        save_graph(model, fused, data_name="fused.data")
        if precision is Precision.BF16:
            return CudaReport(form, bfloat16_from_onnx(fused, target, data_name=data_name))
        if precision is not Precision.FP16:
            raise ExportError(f"CUDA has no form in {precision.value}; expected fp32, fp16 or bf16.")
        if batches is None:
            raise ExportError("FP16 for CUDA needs a calibration set, but none was given. Pass one.")
        ranges = activation_ranges(_runnable(fused) if packed_text else fused, batches())
        return CudaReport(form, fp16_from_onnx(fused, target, data_name=data_name, ranges=ranges))


def require_packs(precision: Precision) -> None:
    """Check that texts can be packed in a precision.

    Raises:
        ExportError: they cannot.
    """
    if precision not in (Precision.FP32, Precision.FP16):
        raise ExportError(
            f"Packed text has no form in {precision.value}: ONNX Runtime's operators for it compute in fp32 "
            "and fp16. Choose fp16, or leave out --packed-text."
        )


def _runnable(graph: Path) -> Path:
    """Write a graph of packed texts beside itself in operators that a processor has."""
    model = onnx_ir.load(graph)
    spell_out_packing(model)
    target = graph.with_name("spelled_out.onnx")
    save_graph(model, target, data_name="spelled_out.data")
    return target
