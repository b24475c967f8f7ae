"""How Triton runs a plan: its profiles, and a request for each of them before the model is ready."""

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
    """Instances on each GPU, with every profile of the plan: Triton takes the one that fits a request."""
    n_profiles = len(PlanManifest.read(plan).profiles)
    return InstanceGroup(count=count, kind="KIND_GPU", profiles=tuple(range(n_profiles)))


def plan_warmups(plan: Path, folder: Path) -> tuple[Warmup, ...]:
    """Requests of each profile's usual shape; their tensors are written into ``folder/warmup``.

    Token ids and pixels are all 1, and so is the mask: any value is valid, and none changes the time.
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
