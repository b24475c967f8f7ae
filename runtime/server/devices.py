"""Devices of a repository's towers: those that need a GPU, and those that stay on the CPU beside one."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EngineError
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Modality
from runtime.repository import manifests_of_repository
from runtime.triton_config import engine_of_tower

__all__ = [
    "TowerFolder",
    "models_of_repository",
    "models_without_gpu",
    "remarks_on_cpu_towers",
    "require_no_gpu",
    "towers_of_repository",
]


@dataclass(frozen=True, slots=True)
class TowerFolder:
    """Triton model of a tower: the manifest and the variant it belongs to, and its engine."""

    manifest: Manifest
    variant: str
    folder: Path
    engine: Engine

    @property
    def on_gpu(self) -> bool:
        """Whether its instances run on a GPU."""
        return self.engine in GPU_ENGINES


def towers_of_repository(repository: Path, names: Collection[str] | None = None) -> Iterator[TowerFolder]:
    """Yield the towers that are in a repository, by model and variant.

    Args:
        names: Models whose towers to yield; ``None`` for all.

    Raises:
        ManifestError: a manifest or a tower's configuration is malformed.
    """
    for manifest in manifests_of_repository(repository, names):
        for key, variant in manifest.variants.items():
            for modality in Modality:
                folder = repository / variant.tower(modality).model
                if folder.is_dir():
                    engine = engine_of_tower(repository, variant.tower(modality))
                    yield TowerFolder(manifest, key, folder, engine)


def require_no_gpu(
    repository: Path, models: Collection[str] | None, names: Collection[str] | None = None
) -> None:
    """Check that a server without a GPU can load the towers.

    Args:
        models: Triton models to be loaded; ``None`` for all of the repository.
        names: Models to look at; ``None`` for all.

    Raises:
        EngineError: a tower needs a GPU; the message says what to serve instead, and where this one runs.
    """
    for tower in towers_of_repository(repository, names):
        if tower.on_gpu and (models is None or tower.folder.name in models):
            raise EngineError(f"{tower.folder.name} {_NEEDS_GPU} {_remedy(tower, repository)}")


def models_without_gpu(repository: Path, names: Collection[str] | None = None) -> tuple[str, ...] | None:
    """Names of the Triton models that a server without a GPU loads; ``None`` for all of the repository.

    Args:
        names: Models to look at; ``None`` for all.

    Raises:
        EngineError: the front ends of a model, or all its towers, need a GPU.
    """
    towers = list(towers_of_repository(repository, names))
    on_gpu = [tower for tower in towers if tower.on_gpu]
    if not on_gpu:
        return None
    for tower in on_gpu:
        if _is_served(tower):
            what = f"{tower.variant}, which the front ends of {tower.manifest.name} serve,"
            raise EngineError(f"{what} {_NEEDS_GPU} {_remedy(tower, repository)}")
    if len(on_gpu) == len(towers):
        what = f"Every variant in {repository} ({', '.join(_variants(towers))})"
        raise EngineError(f"{what} {_NEEDS_GPU} {_remedy(towers[0], repository)}")
    left_out = {tower.folder.name for tower in on_gpu}
    return tuple(name for name in models_of_repository(repository, names) if name not in left_out)


def models_of_repository(repository: Path, names: Collection[str] | None = None) -> tuple[str, ...]:
    """Names of the Triton models that the manifests name and that are there: front ends and towers.

    Args:
        names: Models to look at; ``None`` for all.
    """
    front_ends = {
        model
        for manifest in manifests_of_repository(repository, names)
        for served in manifest.front_ends
        for model in (served.text, served.image)
        if (repository / model).is_dir()
    }
    towers = {tower.folder.name for tower in towers_of_repository(repository, names)}
    return tuple(sorted(front_ends | towers))


_NEEDS_GPU = "runs on an NVIDIA GPU, and this server has none."


def remarks_on_cpu_towers(repository: Path) -> Iterator[str]:
    """Yield a line for each model with towers that stay on the CPU beside a GPU: the reason and a remedy."""
    towers = list(towers_of_repository(repository))
    for name in dict.fromkeys(tower.manifest.name for tower in towers):
        of_model = [tower for tower in towers if tower.manifest.name == name]
        on_cpu = [tower for tower in of_model if not tower.on_gpu]
        on_gpu = [tower for tower in of_model if tower.on_gpu]
        if not on_cpu:
            continue
        served = next((tower.variant for tower in on_gpu if _is_served(tower)), None)
        front_ends = f"babeltower frontends {_quoted(repository / name)} --variant"
        if served is not None:
            remedy = f"Its front ends serve {served} on the GPU."
        elif on_gpu:
            remedy = f"To serve one on the GPU: {front_ends} {on_gpu[0].variant}"
        else:
            export = _export(on_cpu[0], repository, "--precision fp16 --engine cuda")
            remedy = f"To serve one on the GPU: {export} && {front_ends} fp16_cuda"
        variants = ", ".join(_variants(on_cpu))
        yield f"{name}: the towers of {variants} stay on the CPU, where they were measured. {remedy}"


def _remedy(tower: TowerFolder, repository: Path) -> str:
    model = repository / tower.manifest.name
    for_cpu = [
        key
        for key, variant in tower.manifest.variants.items()
        if not set(variant.engines) <= {engine.value for engine in GPU_ENGINES}
    ]
    if for_cpu:
        instead = f"Serve a variant for the CPU: babeltower frontends {_quoted(model)} --variant {for_cpu[0]}"
    else:
        export = _export(tower, repository, "--precision fp32 --engine onnxruntime")
        instead = f"Export a variant for the CPU: {export}"
    container = f"babeltower serve {_quoted(repository)} --target gpu --write FOLDER"
    return f"{instead}; or run it in a container: {container}"


def _export(tower: TowerFolder, repository: Path, wanted: str) -> str:
    return f"babeltower export CHECKPOINT {_quoted(repository)} --name {tower.manifest.name} {wanted}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _variants(towers: Collection[TowerFolder]) -> list[str]:
    return list(dict.fromkeys(tower.variant for tower in towers))


def _is_served(tower: TowerFolder) -> bool:
    return any(served.variant == tower.variant for served in tower.manifest.front_ends)
