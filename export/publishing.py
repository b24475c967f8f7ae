"""Write beside, then rename: how a repository changes without ever being half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BabeltowerError, ExportError
from runtime.manifest import Manifest, Variant, manifest_path

__all__ = ["publish", "staging"]


@contextlib.contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A folder on the repository's disk, beside it where possible: Triton takes all inside for models.

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
        raise ExportError(f"{repository} cannot be written: {error}.") from error
    try:
        yield stage
    except BabeltowerError:
        raise
    except OSError as error:
        free = shutil.disk_usage(repository).free
        raise ExportError(
            f"Writing to {repository} failed: {error}. {free:,} bytes are free there. Nothing was published."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made_here and not any(repository.iterdir()):
            repository.rmdir()


def publish(stage: Path, repository: Path, manifest: Manifest, variant: Variant) -> None:
    """Rename a variant's towers and probes in, then the manifest: its readers find all that it lists."""
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
