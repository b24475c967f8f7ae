"""Atomic publishing: write to a staging folder, then rename into the repository."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.backends import Engine
from runtime.errors import BabeltowerError, ExportError
from runtime.manifest import Manifest, Modality, Precision, Variant, manifest_path

__all__ = ["publish", "remove_unlisted", "staging"]


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
        target = repository / tower.model
        if target.exists():
            target.rename(stage / f"replaced-{tower.model}")
        (stage / tower.model).rename(target)
    for probes in manifest.probes:
        (stage / probes.path).replace(repository / probes.path)
    draft = manifest_path(stage / manifest.name)
    draft.write_text(manifest.to_json(), encoding="utf-8")
    draft.replace(manifest_path(repository / manifest.name))


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
