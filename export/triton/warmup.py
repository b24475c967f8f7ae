"""Instances and warm-up requests of TensorRT plans, for each profile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from export.triton.config import InstanceGroup, Warmup, WarmupInput
from runtime.backends.plans import PlanManifest, Profile, TensorSpec

__all__ = ["plan_instances", "plan_warmups"]

_FOLDER = "warmup"
_TYPES = {"int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}


def plan_instances(plan: Path, count: int = 1) -> InstanceGroup:
    """Return instances on each GPU with all profiles of the plan; Triton selects the one for each request."""
    n_profiles = len(PlanManifest.read(plan).profiles)
    return InstanceGroup(count=count, kind="KIND_GPU", profiles=tuple(range(n_profiles)))


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
