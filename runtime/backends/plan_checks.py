"""Checks before a TensorRT plan runs: machine, inputs and choice of profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.plans import (
    AHEAD_OF_TIME,
    Compiler,
    DeviceFacts,
    PlanManifest,
    Portability,
    Profile,
    TensorSpec,
)
from runtime.errors import EngineError
from runtime.manifest import Precision, TowerFiles

__all__ = ["profile_for", "require_fit", "require_plan_of_tower", "sizes_of_inputs"]


def require_fit(manifest: PlanManifest, precision: Precision, version: str, device: DeviceFacts) -> None:
    """Check that a plan can run with this TensorRT version, GPU and precision.

    Raises:
        EngineError: it was built for another precision, TensorRT version or GPU, or only to check the graph.
    """
    if manifest.compiler != Compiler.TENSORRT.value:
        raise EngineError(
            f"The plan is a {manifest.note or AHEAD_OF_TIME}: it only checks the graph. Build one with "
            f"TensorRT on this machine, from {manifest.onnx}."
        )
    if manifest.precision != precision.value:
        raise EngineError(
            f"The plan computes in {manifest.precision}; {precision.value} was requested. Open the model "
            f"with precision={manifest.precision!r}."
        )
    if not _runs_version(manifest, version):
        raise EngineError(
            f"The plan was built with TensorRT {manifest.compiler_version}; {version} is installed. Rebuild "
            f"it from {manifest.onnx}, here or as version-compatible, or install that release."
        )
    if not _runs_on(manifest, device):
        raise EngineError(
            f"The plan was built for {manifest.gpu} (compute capability {manifest.compute_capability}, "
            f"portability {manifest.portability!r}); this GPU is {device.name} "
            f"({device.compute_capability}). Build the plan here from {manifest.onnx}."
        )


def require_plan_of_tower(repository: Path, tower: TowerFiles) -> None:
    """Check that a plan was built from the graph and weights that its tower was measured with.

    Raises:
        EngineError: it was built from another graph, or after the manifest was written.
        ManifestError: its own manifest is missing, or is another plan's.
    """
    plan = repository / tower.model / str(tower.version) / tower.graph
    manifest = PlanManifest.read(plan)
    folder = f"{tower.model}/{tower.version}/"
    recorded = {r.path.removeprefix(folder): r.sha256 for r in tower.files if r.path.startswith(folder)}
    built = {plan.name: manifest.plan_sha256, manifest.onnx: manifest.onnx_sha256, **manifest.onnx_data}
    for name, sha256 in built.items():
        if recorded.get(name) != sha256:
            what = "is another plan" if name == plan.name else f"was built from another {name}"
            raise EngineError(
                f"The plan {plan} {what} than the one the model was measured with (sha256 "
                f"{sha256[:16]}…; the model's manifest says {recorded.get(name, 'nothing')[:16]}…). It is "
                "stale: export the checkpoint again on this machine, or copy the repository again."
            )


def _runs_version(manifest: PlanManifest, version: str) -> bool:
    """Check for the same release, or a later one of the same major version if the plan allows it."""
    if manifest.compiler_version == version:
        return True
    built, here = _numbers(manifest.compiler_version), _numbers(version)
    return manifest.version_compatible and built[0] == here[0] and here >= built


def _runs_on(manifest: PlanManifest, device: DeviceFacts) -> bool:
    match Portability(manifest.portability):
        case Portability.NONE:
            same_gpu = manifest.gpu == device.name
            return same_gpu and manifest.compute_capability == device.compute_capability
        case Portability.SAME_COMPUTE_CAPABILITY:
            return manifest.compute_capability == device.compute_capability
        case Portability.AMPERE_PLUS:
            return _numbers(device.compute_capability) >= (8, 0)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def sizes_of_inputs(specs: Mapping[str, TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Return the sizes of the dynamic dimensions, read from the arrays.

    Raises:
        EngineError: an array is missing or unknown, has another dtype or shape, or two arrays disagree.
    """
    if inputs.keys() != specs.keys():
        raise EngineError(f"The plan expects inputs {sorted(specs)}; got {sorted(inputs)}.")
    sizes: dict[str, int] = {}
    for name, spec in specs.items():
        array = inputs[name]
        for dim, size in zip(spec.dims, array.shape, strict=False):
            if not dim.isdigit():
                sizes.setdefault(dim, size)
        if array.dtype != np.dtype(spec.dtype) or len(spec.dims) != array.ndim:
            raise EngineError(f"Input {name!r} is {array.dtype}{list(array.shape)}; the plan expects {spec}.")
        if array.shape != spec.shape(sizes):
            raise EngineError(
                f"Input {name!r} has shape {list(array.shape)}; the plan expects {list(spec.shape(sizes))}."
            )
    return sizes


def profile_for(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Return the index of the smallest profile that covers the sizes.

    Raises:
        EngineError: no profile covers them; a request is never truncated or split silently.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.admits(sizes)]
    if not fitting:
        asked = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise EngineError(
            f"No profile of the plan covers {asked}; it has {'; '.join(map(str, profiles))}. Send smaller "
            "batches or shorter texts, or build the plan with a larger profile."
        )
    return min(fitting, key=lambda index: profiles[index].capacity)
