"""Manifest of a TensorRT plan: its shapes, library, GPU and source graph.

A plan is machine code for one GPU. ``model.plan.json`` and the source ONNX file lie beside ``model.plan``,
so that another machine can build its own plan.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import ManifestError
from runtime.manifest import Precision
from runtime.storage import sha256_of_file
from runtime.typed_json import OPTIONAL, value_from_json

__all__ = [
    "AHEAD_OF_TIME",
    "LEAST_CAPABILITY",
    "PLAN_FORMAT",
    "TENSORRT_MAJORS",
    "VERSION_COMPATIBLE",
    "Compiler",
    "DeviceFacts",
    "Extent",
    "KernelSummary",
    "PlanManifest",
    "Portability",
    "Profile",
    "TensorSpec",
    "plan_manifest_path",
]

LEAST_CAPABILITY: Mapping[Precision, tuple[int, int]] = {Precision.BF16: (8, 0), Precision.FP8: (8, 9)}
"""Compute capability from which a GPU multiplies in a precision: Ampere and Ada; others need none."""

TENSORRT_MAJORS = (10, 11)
"""Major versions of TensorRT whose Python interface the backend and the exporter know."""

PLAN_FORMAT = "babeltower-plan/1"
"""Version of the layout; readers reject any other."""

VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"
"""Option of ``tritonserver`` without which it opens no version-compatible plan, since these contain code."""

AHEAD_OF_TIME = "TensorRT-RTX ahead-of-time build, not executed"
"""Label of a ``Compiler.TENSORRT_RTX`` plan in every report."""


class Compiler(str, Enum):
    """Compiler that builds a plan."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Portability(str, Enum):
    """Other GPUs on which a plan may run."""

    NONE = "none"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"
    AMPERE_PLUS = "ampere-plus"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A GPU: its name, compute capability (``"8.9"``) and the CUDA runtime's version (``"13.0"``)."""

    name: str
    compute_capability: str
    cuda: str

    def multiplies_in(self, precision: Precision) -> bool:
        """Return whether the GPU has products of a precision."""
        capability = tuple(int(part) for part in self.compute_capability.split("."))
        return capability >= LEAST_CAPABILITY.get(precision, (0, 0))


@dataclass(frozen=True, slots=True)
class Extent:
    """Bounds of a dynamic dimension, and the size that kernels are tuned for."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise ManifestError(
                f"Invalid extent: least {self.least}, usual {self.usual}, most {self.most}; expected "
                "1 ≤ least ≤ usual ≤ most."
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """Bucket of shapes: an extent for each dynamic dimension (``batch``, ``sequence``)."""

    dims: Mapping[str, Extent]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Check that the profile covers these sizes."""
        return all(e.least <= sizes[name] <= e.most for name, e in self.dims.items())

    @property
    def largest(self) -> dict[str, int]:
        """Largest sizes, for which buffers are allocated."""
        return {name: extent.most for name, extent in self.dims.items()}

    @property
    def capacity(self) -> int:
        """Largest product of the dimensions, an upper bound on the elements of a run."""
        return math.prod(extent.most for extent in self.dims.values())

    def __str__(self) -> str:
        return " × ".join(f"{name} {e.least}–{e.most}" for name, e in self.dims.items())


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's numpy dtype and dimensions: numbers, or names of dynamic ones (``("batch", "128")``)."""

    dtype: str
    dims: tuple[str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape for given sizes of the dynamic dimensions."""
        return tuple(int(dim) if dim.isdigit() else sizes[dim] for dim in self.dims)

    def n_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the tensor's size in bytes for given sizes of the dynamic dimensions."""
        return math.prod(self.shape(sizes)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class KernelSummary:
    """Summary of the built kernels, as far as the compiler reports them.

    ``products`` counts the graph's matrix products by the operand type of their kernels; ``unseen`` lists
    the products that no kernel names. ``tactics`` counts the products by the implementation that the compiler
    chose, as far as it names them; ``n_half_accumulators`` of them sum in FP16. Older manifests have neither.
    """

    n_kernels: int
    products: Mapping[str, int]
    n_fused_attention: int
    unseen: tuple[str, ...]
    tactics: Mapping[str, int] = field(default_factory=dict, metadata={OPTIONAL: True})
    n_half_accumulators: int = field(default=0, metadata={OPTIONAL: True})


@dataclass(frozen=True, slots=True)
class PlanManifest:
    """Manifest of one plan; ``compute_capability`` is like ``"8.9"``, ``gpu`` is empty if none was used.

    ``onnx_data`` has the sha256 of each weight file of the graph, ``options`` the builder's settings; older
    manifests have neither. For readers, ``runs_on`` states the TensorRT releases that can open the plan, and
    ``serve_with`` the option that ``tritonserver`` needs for it.
    """

    compiler: str
    compiler_version: str
    cuda: str
    gpu: str
    compute_capability: str
    portability: str
    version_compatible: bool
    precision: str
    profiles: tuple[Profile, ...]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    kernels: KernelSummary
    plan_sha256: str
    plan_bytes: int
    onnx: str
    onnx_sha256: str
    onnx_data: Mapping[str, str] = field(default_factory=dict, metadata={OPTIONAL: True})
    options: Mapping[str, Any] = field(default_factory=dict, metadata={OPTIONAL: True})
    runs_on: str = field(default="", metadata={OPTIONAL: True})
    serve_with: str = field(default="", metadata={OPTIONAL: True})
    note: str = ""
    format: str = PLAN_FORMAT

    def write(self, plan: Path) -> None:
        """Write the manifest beside a plan."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        plan_manifest_path(plan).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, plan: Path) -> PlanManifest:
        """Read the manifest beside a plan and verify the plan.

        Raises:
            ManifestError: it is missing or malformed, or describes another plan.
        """
        path = plan_manifest_path(plan)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ManifestError(f"Plan {plan} has no {path.name} beside it: build the plan again.") from None
        except ValueError as error:
            raise ManifestError(f"{path} is not JSON: {error}. Build the plan again.") from error
        if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
            raise ManifestError(f"{path} is not of format {PLAN_FORMAT!r}: build the plan again.")
        manifest: PlanManifest = value_from_json(cls, data, path.name)
        manifest._verify(plan)
        return manifest

    def _verify(self, plan: Path) -> None:
        if not plan.is_file():
            raise ManifestError(f"Plan {plan} is missing: build it from {self.onnx}.")
        if plan.stat().st_size != self.plan_bytes or sha256_of_file(plan) != self.plan_sha256:
            raise ManifestError(
                f"{plan} is not the plan its manifest describes (sha256 {self.plan_sha256[:16]}…, "
                f"{self.plan_bytes} bytes): build it from {self.onnx} again."
            )


def plan_manifest_path(plan: Path) -> Path:
    """Return the manifest's path: ``model.plan`` → ``model.plan.json``."""
    return plan.with_name(f"{plan.name}.json")
