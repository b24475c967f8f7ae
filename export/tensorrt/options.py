"""How a TensorRT plan is to be built: compiler, portability, memory, and the shapes it shall run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.plans import Compiler, Extent, Portability, Profile
from runtime.errors import ExportError

__all__ = ["SHORT_TEXT", "EngineOptions", "default_profiles"]

SHORT_TEXT = 32
"""Tokens of a caption; a profile of its own spares it the kernels of long texts."""

_USUAL_TEXT = 16


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build.

    Attributes:
        compiler: Which library; no other is ever taken instead.
        compute_capability: The target of an ahead-of-time build (``"8.9"``); else that of GPU 0.
        portability: On which other GPUs the plan may run.
        version_compatible: Let later releases of the same major version run the plan.
        workspace_bytes: Scratch memory that kernels may use; ``None`` for all there is.
        weight_streaming: Let weights stay in host memory where the GPU's is too small.
        timing_cache: File of kernel timings, read if it is there and written back; TensorRT-RTX keeps none.
        tf32: Let FP32 products round their operands to TF32; then FP32 is not what it says.
    """

    compiler: Compiler = Compiler.TENSORRT
    compute_capability: str | None = None
    portability: Portability = Portability.NONE
    version_compatible: bool = False
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        ahead = self.compiler is Compiler.TENSORRT_RTX
        if ahead and self.compute_capability is None:
            raise ExportError("An ahead-of-time build needs compute_capability, such as '8.9'.")
        if ahead and self.version_compatible:
            raise ExportError("TensorRT-RTX builds no version-compatible plan on a CPU; leave it out.")
        if ahead and self.timing_cache is not None:
            raise ExportError("TensorRT-RTX times no kernels while it builds; leave timing_cache out.")
        if not ahead and self.compute_capability is not None:
            raise ExportError("TensorRT builds for the GPU that is here; leave compute_capability out.")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ExportError(f"A workspace of {self.workspace_bytes} bytes is none; pass None for no limit.")


def default_profiles(dims: Sequence[str], *, max_batch: int, context_length: int = 1) -> tuple[Profile, ...]:
    """Buckets for a tower: one row alone, batches of short texts, batches of any.

    Args:
        dims: The graph's dynamic dimensions, ``("batch",)`` or ``("batch", "sequence")``.
        max_batch: Rows of the largest batch.
        context_length: Tokens of the longest text.
    """
    alone, together = Extent(1, 1, 1), Extent(1, max(1, max_batch // 4), max_batch)
    if "sequence" not in dims:
        return (Profile({"batch": alone}), Profile({"batch": together}))
    short = min(SHORT_TEXT, context_length)
    usual = min(_USUAL_TEXT, context_length)
    return (
        Profile({"batch": alone, "sequence": Extent(1, usual, context_length)}),
        Profile({"batch": together, "sequence": Extent(1, usual, short)}),
        Profile({"batch": together, "sequence": Extent(1, short, context_length)}),
    )
