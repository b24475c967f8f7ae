"""The graph that ONNX Runtime's CUDA kernels want: few large nodes, no shape arithmetic, no convolution.

Each pass is exact in real arithmetic. Together they leave about a third of the nodes, and a graph that a CUDA
graph can capture: every node has a CUDA kernel, and no node's shape is computed on the processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir

from export.graphs.batch_constants import expand_by_pixels
from export.graphs.early_pooling import pool_early
from export.graphs.exact_pixels import mark_pixels
from export.graphs.folding import fold
from export.graphs.fused_activations import fuse_activations
from export.graphs.fused_attention import Projections, fuse_attention
from export.graphs.fused_norms import CONTRIB, fuse_l2_norms, fuse_skip_norms
from export.graphs.mean_pooling import pool_by_product
from export.graphs.packed_text import pack_text
from export.graphs.product_biases import add_biases_within
from runtime.errors import ExportError

__all__ = ["CudaFormReport", "suit_cuda"]

_REPLACED = frozenset({"Shape", "Size", "NonZero", "Expand", "Conv", "Softmax"})
"""Operators that must be gone: they run on the processor, need it to know a shape, need cuDNN, or are
left of an attention that was not fused."""


@dataclass(frozen=True, slots=True)
class CudaFormReport:
    """Counts of the rewrite: fused nodes by kind, and all nodes before and after."""

    fused: Mapping[str, int]
    n_nodes_before: int
    n_nodes: int


def suit_cuda(
    model: onnx_ir.Model, *, projections: Projections = Projections.SEPARATE, packed_text: bool = False
) -> CudaFormReport:
    """Rewrite an exported FP32 graph for the CUDA provider, in place.

    Args:
        packed_text: Compute a text tower without padding; its runs then have a size that the processor must
            know, so that no CUDA graph can be captured.

    Raises:
        ExportError: a node is left that a GPU cannot run without the processor; the message names it. Also if
            texts cannot be packed.
    """
    before = len(model.graph)
    fold(model)
    model.opset_imports[CONTRIB] = 1
    fused = {
        "pooled_early": pool_early(model),
        "attentions": fuse_attention(model, projections),
        "packed": pack_text(model) if packed_text else 0,
        "activations": fuse_activations(model),
        "norms": fuse_skip_norms(model),
        "l2_norms": fuse_l2_norms(model),
        "mean_pools": pool_by_product(model),
        "tokens": expand_by_pixels(model),
        "biases": add_biases_within(model),
        "pixels": mark_pixels(model),
    }
    _require_fit(model)
    return CudaFormReport(fused, before, len(model.graph))


def _require_fit(model: onnx_ir.Model) -> None:
    left = Counter(node.op_type for node in model.graph if node.op_type in _REPLACED)
    if left:
        raise ExportError(
            f"The graph {model.graph.name!r} keeps {dict(left)} when fused for CUDA, so it could not run "
            "on a GPU alone. Choose another engine, and report the checkpoint's architecture."
        )
