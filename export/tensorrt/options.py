"""Build options of a TensorRT plan: compiler, portability, memory, and optimization profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.plans import Compiler, Extent, Portability, Profile
from runtime.errors import ExportError
from runtime.preprocessing.buckets import text_buckets

__all__ = ["FEW_ROWS", "MAX_OPTIMIZATION_LEVEL", "SHORT_TEXT", "EngineOptions", "default_profiles"]

FEW_ROWS = 8
"""Maximum rows of a request whose time is launches and weights; that of larger ones is arithmetic."""

SHORT_TEXT = 32
"""Maximum tokens of a short text; its own profile avoids kernels tuned for long texts."""

MAX_OPTIMIZATION_LEVEL = 5
"""Highest optimization level of TensorRT's builder."""

_USUAL_TEXT = 16


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of a TensorRT build.

    Attributes:
        compiler: Compiler library; another one is never used instead.
        compute_capability: Target of an ahead-of-time build (``"8.9"``); None for the
            installed GPU.
        portability: Other GPUs that the plan may run on.
        version_compatible: Allow later releases of the same major version to run the plan.
        workspace_bytes: Limit on scratch memory of kernels; None for no limit.
        optimization_level: Effort of the builder, 0 to 5: higher levels try more kernels; None for
            its default.
        weight_streaming: Allow weights to stay in host memory if the GPU's is too small.
        timing_cache: File of kernel timings, read if it exists and written back; not used by TensorRT-RTX.
        tf32: Allow FP32 products to round their operands to TF32, which loses FP32 accuracy.
        gpu: Number of the GPU that the plan is built on.
    """

    compiler: Compiler = Compiler.TENSORRT
    compute_capability: str | None = None
    portability: Portability = Portability.NONE
    version_compatible: bool = False
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    tf32: bool = False
    gpu: int = 0

    def __post_init__(self) -> None:
        ahead = self.compiler is Compiler.TENSORRT_RTX
        if ahead and self.compute_capability is None:
            raise ExportError("An ahead-of-time build needs compute_capability, such as '8.9'.")
        if ahead and self.version_compatible:
            raise ExportError(
                "TensorRT-RTX cannot build a version-compatible plan on a CPU; leave version_compatible out."
            )
        if ahead and self.timing_cache is not None:
            raise ExportError("TensorRT-RTX does not use kernel timings; leave timing_cache out.")
        if not ahead and self.compute_capability is not None:
            raise ExportError("TensorRT builds for the installed GPU; leave compute_capability out.")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ExportError(
                f"workspace_bytes is {self.workspace_bytes}; expected at least 1, or None for no limit."
            )
        level = self.optimization_level
        if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
            raise ExportError(
                f"optimization_level is {level}; expected 0 to {MAX_OPTIMIZATION_LEVEL}, or None for the "
                "builder's default."
            )

    def as_json(self) -> dict[str, Any]:
        """Return the builder's settings for the plan's manifest, without the file of timings."""
        return {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "weight_streaming": self.weight_streaming,
            "tf32": self.tf32,
            "timing_cache": self.timing_cache is not None,
        }


def default_profiles(dims: Sequence[str], *, max_batch: int, context_length: int = 1) -> tuple[Profile, ...]:
    """Return optimization profiles of a tower, each for a group of the shapes that it is run in.

    Rows are grouped as one, few and many, and texts as short and long; kernels are tuned for a shape within
    each group. A profile reaches down to the smallest shape, since Triton sends any shape.

    Args:
        dims: The graph's dynamic dimensions, ``("batch",)`` or ``("batch", "sequence")``.
        max_batch: Maximum batch size in rows.
        context_length: Maximum text length in tokens.
    """
    rows = [Extent(1, most, most) for most in sorted({1, min(FEW_ROWS, max_batch), max_batch})]
    if "sequence" not in dims:
        return tuple(Profile({"batch": extent}) for extent in rows)
    lengths = text_buckets(context_length).lengths
    usual = min(_USUAL_TEXT, context_length)
    longer = next((length for length in lengths if length > SHORT_TEXT), context_length)
    one_row = {"batch": rows[0], "sequence": Extent(1, usual, context_length)}
    tokens = [Extent(1, usual, min(SHORT_TEXT, context_length))]
    if context_length > SHORT_TEXT:
        tokens.append(Extent(1, longer, context_length))
    several = ({"batch": batch, "sequence": extent} for batch in rows[1:] for extent in tokens)
    return tuple(Profile(found) for found in (one_row, *several))
