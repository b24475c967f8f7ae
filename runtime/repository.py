"""A Triton model repository: staged, published and read as a whole; never half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

from runtime.errors import BabeltowerError, ExportError
from runtime.manifest import (
    Engine,
    FrontEnds,
    Manifest,
    Modality,
    Precision,
    TowerFiles,
    Variant,
    manifest_path,
    names_in_repository,
    record_of_file,
)
from runtime.storage import replace_text
from runtime.triton_config import CONFIG_FILE

__all__ = [
    "manifests_of_repository",
    "publish",
    "remove_unlisted",
    "rename_in",
    "staging",
    "variant_with_configs",
    "write_manifest",
]

Listed = TypeVar("Listed", TowerFiles, FrontEnds)


@contextlib.contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """Create a staging folder on the repository's disk; removed at the end.

    It lies beside the repository if possible, since Triton treats every folder inside as a model.

    Raises:
        ExportError: the repository cannot be written, or the disk is full.
    """
    made_here = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
        parent = repository.resolve().parent
        beside = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
        stage = Path(
            tempfile.mkdtemp(prefix=f".{repository.name}.staging-", dir=parent if beside else repository)
        )
    except OSError as error:
        raise ExportError(
            f"{repository} cannot be written: {error}. Check its permissions, or choose another folder."
        ) from error
    try:
        yield stage
    except BabeltowerError:
        raise
    except OSError as error:
        free = shutil.disk_usage(repository).free
        raise ExportError(
            f"Writing to {repository} failed: {error}. It has {free:,} bytes free. Nothing was published."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made_here and not any(repository.iterdir()):
            repository.rmdir()


def publish(stage: Path, repository: Path, manifest: Manifest, variant: Variant) -> None:
    """Rename a variant's towers and probes into the repository, and the manifest last.

    Readers of the manifest thus always find the files that it lists.
    """
    for tower in (variant.text, variant.image):
        rename_in(stage / tower.model, repository, stage)
    for probes in manifest.probes:
        (stage / probes.path).replace(repository / probes.path)
    replace_text(manifest_path(repository / manifest.name), manifest.to_json())


def rename_in(folder: Path, repository: Path, stage: Path) -> None:
    """Rename a Triton model into the repository; one of that name goes to the stage, and away with it."""
    target = repository / folder.name
    if target.exists():
        target.rename(stage / f"replaced-{target.name}")
    folder.rename(target)


def remove_unlisted(stage: Path, repository: Path, manifest: Manifest) -> list[str]:
    """Move towers that the model's manifest does not list to ``stage``, so that Triton does not load them.

    Call this last, when nothing refers to them. It also removes leftovers of an interrupted export.

    Returns:
        Names of the removed folders.
    """
    listed = {
        tower.model
        for variant in (*manifest.variants.values(), *(kept.variant for kept in manifest.kept))
        for tower in (variant.text, variant.image)
    }
    modalities, precisions, engines = ("|".join(m.value for m in e) for e in (Modality, Precision, Engine))
    tower = re.compile(f"{re.escape(manifest.name)}_({modalities})_tower_({precisions})(_({engines}))?")
    unlisted = [
        folder
        for folder in sorted(repository.iterdir())
        if folder.is_dir() and tower.fullmatch(folder.name) and folder.name not in listed
    ]
    for folder in unlisted:
        folder.rename(stage / f"unlisted-{folder.name}")
    return [folder.name for folder in unlisted]


def manifests_of_repository(repository: Path, names: Collection[str] | None = None) -> Iterator[Manifest]:
    """Read the manifest of every model in a repository, by name.

    Args:
        names: Models to read; ``None`` for all.

    Raises:
        ManifestError: one is malformed.
    """
    for name in names_in_repository(repository) if names is None else sorted(names):
        yield Manifest.read(repository / name)


def write_manifest(model: Path, manifest: Manifest) -> None:
    """Replace the manifest of ``REPOSITORY/NAME``, with fresh checksums of its configurations."""
    repository = model.parent
    variants = {key: variant_with_configs(v, repository) for key, v in manifest.variants.items()}
    front_ends = tuple(_with_config(found, repository) for found in manifest.front_ends)
    written = dataclasses.replace(manifest, variants=variants, front_ends=front_ends)
    replace_text(manifest_path(model), written.to_json())


def variant_with_configs(variant: Variant, repository: Path) -> Variant:
    """Return a variant with fresh checksums of its towers' configurations."""
    text, image = (_with_config(tower, repository) for tower in (variant.text, variant.image))
    return dataclasses.replace(variant, text=text, image=image)


def _with_config(listed: Listed, repository: Path) -> Listed:
    files = tuple(
        record_of_file(repository, repository / record.path)
        if record.path.endswith(f"/{CONFIG_FILE}")
        else record
        for record in listed.files
    )
    return dataclasses.replace(listed, files=files)
