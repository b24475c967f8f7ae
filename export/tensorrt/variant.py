"""Convert an FP32 graph to a TensorRT variant: the graph in its precision, and a plan for this GPU.

The ONNX file is kept beside the plan, so that another machine can build its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir

from export.graphs.files import copy_graph
from export.graphs.token_rows import keep_token_rows
from export.precision.activation_ranges import activation_ranges
from export.precision.fp8 import fp8_from_onnx
from export.precision.fp16 import bfloat16_from_onnx, fp16_from_onnx
from export.precision.graph_request import GraphRequest
from export.precision.int8 import GraphTarget, Int8Recipe, Int8Report, int8_from_onnx, recipe_for
from export.tensorrt.engine import engine_from_onnx, require_compiler
from export.tensorrt.options import EngineOptions, default_profiles
from runtime.backends.plans import PlanManifest
from runtime.errors import EngineError
from runtime.manifest import Precision

__all__ = ["PLAN", "TensorRtGraph", "plan_maker", "require_gpu", "tensorrt_graph"]

PLAN = "model.plan"
"""File name of the plan, beside the ONNX file, as Triton's TensorRT backend expects."""

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TensorRtGraph:
    """Summary of a graph for TensorRT: the share of products in its precision, and the INT8 report if any."""

    share: float
    kept_products: tuple[str, ...]
    int8: Int8Report | None = None


def tensorrt_graph(
    precision: Precision,
    source: Path,
    target: Path,
    *,
    data_name: str,
    batches: Batches,
    recipe: Int8Recipe | None = None,
    threads: int | None = None,
) -> TensorRtGraph:
    """Write a graph for TensorRT, whose types determine the precision of the strongly typed network.

    Args:
        source: FP32 ONNX file.
        target: Output file; large weights go to the external data file ``data_name`` beside it.
        batches: Calibration batches to measure ranges on; not needed for FP32 and BF16.
        recipe: INT8 recipe; TensorRT's default if None.

    Raises:
        ExportError: the graph could not be converted.
    """
    match precision:
        case Precision.FP32:
            copy_graph(source, target)
            return TensorRtGraph(1.0, ())
        case Precision.FP16:
            ranges = activation_ranges(source, batches, threads=threads)
            halved = fp16_from_onnx(source, target, data_name=data_name, ranges=ranges)
            return TensorRtGraph(halved.half_share, tuple(node.name for node in halved.kept_products))
        case Precision.BF16:
            converted = bfloat16_from_onnx(source, target, data_name=data_name)
            return TensorRtGraph(converted.half_share, tuple(node.name for node in converted.kept_products))
        case Precision.INT8:
            return _int8(source, target, data_name=data_name, batches=batches, recipe=recipe, threads=threads)
        case Precision.FP8:
            ranges = activation_ranges(source, batches, threads=threads)
            report = fp8_from_onnx(source, target, data_name=data_name, ranges=ranges)
            return TensorRtGraph(report.share_fp8, tuple(node.name for node in report.kept))


def _int8(
    source: Path,
    target: Path,
    *,
    data_name: str,
    batches: Batches,
    recipe: Int8Recipe | None,
    threads: int | None,
) -> TensorRtGraph:
    """Quantize to INT8, then convert everything else to FP16."""
    quantized = target.with_name(f"quantized-{target.name}")
    try:
        report = int8_from_onnx(
            source,
            quantized,
            data_name=f"quantized-{data_name}",
            calibration=batches,
            recipe=recipe or recipe_for(GraphTarget.TENSORRT),
        )
        ranges = activation_ranges(quantized, batches, threads=threads)
        fp16_from_onnx(quantized, target, data_name=data_name, ranges=ranges)
    finally:
        for path in (quantized, quantized.with_name(f"quantized-{data_name}")):
            path.unlink(missing_ok=True)
    return TensorRtGraph(report.share_int8, tuple(report.kept), report)


def plan_maker(
    precision: Precision, options: EngineOptions, describe: Callable[[TensorRtGraph], Mapping[str, Any]]
) -> Any:
    """Return a form's ``make`` function, which writes the graph and builds the plan beside it."""

    def make(request: GraphRequest) -> dict[str, Any]:
        recipe = request.recipe
        graph = tensorrt_graph(
            precision,
            request.source,
            request.target,
            data_name=request.data_name,
            batches=() if request.calibration is None else request.calibration.batches(request.modality),
            recipe=recipe,
        )
        if request.kept_rows is not None:
            keep_token_rows(request.target, request.kept_rows, data_name=request.data_name)
        dims = _dynamic_dims(request.target)
        manifest = engine_from_onnx(
            request.target,
            request.target.with_name(PLAN),
            profiles=default_profiles(
                dims, max_batch=request.max_batch_size, context_length=request.context_length
            ),
            options=options,
        )
        return {**describe(graph), **_facts(manifest)}

    return make


def require_gpu(options: EngineOptions) -> None:
    """Check that a plan can be built, before any work.

    Raises:
        EngineError: TensorRT or a GPU is missing.
    """
    try:
        require_compiler(options)
    except EngineError as error:
        raise EngineError(
            f"A TensorRT variant must be built and measured on the GPU that serves it. {error} To export "
            "without a GPU, choose other engines: --engine onnxruntime --engine openvino."
        ) from error


def _dynamic_dims(graph: Path) -> list[str]:
    inputs = onnx_ir.load(graph).graph.inputs
    dims = (dim for value in inputs for dim in value.shape or () if not isinstance(dim, int))
    return list(dict.fromkeys(str(dim.value) for dim in dims))


def _facts(manifest: PlanManifest) -> dict[str, Any]:
    return {
        "tensorrt": manifest.compiler_version,
        "runs_on": manifest.runs_on,
        "serve_with": manifest.serve_with,
        "portability": manifest.portability,
        "options": dict(manifest.options),
        "gpu": manifest.gpu,
        "compute_capability": manifest.compute_capability,
        "profiles": [str(profile) for profile in manifest.profiles],
        "products": dict(manifest.kernels.products),
        "n_fused_attention": manifest.kernels.n_fused_attention,
        "unseen_products": list(manifest.kernels.unseen),
        "n_half_accumulators": manifest.kernels.n_half_accumulators,
    }
