"""Instances, CUDA graphs and warm-up requests of TensorRT plans, for each profile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from export.triton.config import CudaGraph, InstanceGroup, TensorConfig, Warmup, WarmupInput
from runtime.backends.plans import PlanManifest, Profile, TensorSpec
from runtime.preprocessing.buckets import Buckets

__all__ = ["MAX_GRAPH_TOKENS", "plan_graphs", "plan_instances", "plan_warmups"]

MAX_GRAPH_TOKENS = 2_048
"""Rows × length up to which a run is captured as a CUDA graph; larger ones hide their launches."""

_IMAGE_TOKENS = 64
"""Tokens of one image, for ``MAX_GRAPH_TOKENS``: 50 to 257 in the vision transformers that are published."""

_FOLDER = "warmup"
_TYPES = {"int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}


def plan_instances(plan: Path, count: int = 1) -> InstanceGroup:
    """Return instances on each GPU with all profiles of the plan; Triton selects the one for each request."""
    n_profiles = len(PlanManifest.read(plan).profiles)
    return InstanceGroup(count=count, kind="KIND_GPU", profiles=tuple(range(n_profiles)))


def plan_graphs(plan: Path, inputs: Iterable[TensorConfig], buckets: Buckets) -> tuple[CudaGraph, ...]:
    """Return the small shapes of ``buckets`` that a profile of the plan admits.

    The backend uses a graph only for a batch of exactly its shape; front ends send no other shapes.

    Args:
        inputs: The tower's inputs, without the batch; a dynamic dimension is the length.
    """
    profiles = PlanManifest.read(plan).profiles
    tensors = tuple(inputs)
    is_text = any(-1 in tensor.dims for tensor in tensors)
    return tuple(
        CudaGraph(rows, {t.name: tuple(length if d == -1 else d for d in t.dims) for t in tensors})
        for rows, length in buckets.shapes
        if rows * (length if is_text else _IMAGE_TOKENS) <= MAX_GRAPH_TOKENS
        and any(profile.admits({"batch": rows, "sequence": length}) for profile in profiles)
    )


def plan_warmups(plan: Path, folder: Path) -> tuple[Warmup, ...]:
    """Return a warm-up request of each profile's usual shape, and write its tensors to ``folder/warmup``.

    Token ids, masks and pixels are all 1; any valid values take the same time.
    """
    manifest = PlanManifest.read(plan)
    (folder / _FOLDER).mkdir(exist_ok=True)
    return tuple(
        Warmup(
            name=f"profile {index}",
            batch_size=profile.dims["batch"].usual,
            inputs=tuple(_inputs(manifest.inputs.items(), profile, folder, index)),
        )
        for index, profile in enumerate(manifest.profiles)
    )


def _inputs(
    specs: Iterable[tuple[str, TensorSpec]], profile: Profile, folder: Path, index: int
) -> Iterator[WarmupInput]:
    usual = {name: extent.usual for name, extent in profile.dims.items()}
    for name, spec in specs:
        shape = spec.shape(usual)[1:]
        file = f"profile{index}_{name}"
        (folder / _FOLDER / file).write_bytes(np.ones(shape, spec.dtype).tobytes())
        yield WarmupInput(name=name, data_type=_TYPES[spec.dtype], dims=shape, file=file)
