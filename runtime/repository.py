"""A Triton model repository: staged, published and read as a whole; never half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from runtime.errors import BabeltowerError, ExportError
from runtime.logs import LOGGER
from runtime.manifest import (
    Engine,
    FileRecord,
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
from runtime.repository_lock import LOCK_FILE, repository_lock
from runtime.storage import remove_unfinished
from runtime.transaction import (
    ChangeJournal,
    FileChange,
    WorkOutcome,
    carried_out,
    is_named_by_journal,
    recover,
    write_journal,
)
from runtime.triton_config import CONFIG_FILE

__all__ = [
    "commit",
    "finish",
    "has_leftovers",
    "manifests_of_repository",
    "publish",
    "record_with_drafts",
    "relative_path",
    "remove_unlisted",
    "staging",
    "variant_with_configs",
    "with_config_records",
]

Result = TypeVar("Result")
Listed = TypeVar("Listed", TowerFiles, FrontEnds)


@contextlib.contextmanager
def staging(repository: Path, command: str) -> Iterator[Path]:
    """Create a staging folder on the repository's disk, and hold the repository's lock; removed at the end.

    What a killed command left is finished or undone first. The stage lies beside the repository if possible,
    since Triton treats every folder inside as a model.

    Args:
        command: Command that changes the repository, for the message of others.

    Raises:
        ExportError: the repository cannot be written, or the disk is full.
        RepositoryInUseError: another command changes it.
        ManifestError: what a killed command left cannot be finished or undone.
    """
    made_here = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with _stage_of(repository, command) as (stage, is_outermost):
            if is_outermost:
                recover(repository, stage, lambda journal: LOGGER.warning("%s", journal))
                _sweep(repository, stage)
            try:
                yield stage
            except BabeltowerError:
                raise
            except OSError as error:
                free = shutil.disk_usage(repository).free
                raise ExportError(
                    f"Writing to {repository} failed: {error}. It has {free:,} bytes free. "
                    "Nothing was published."
                ) from error
    except OSError as error:
        raise ExportError(
            f"{repository} cannot be written: {error}. Check its permissions, or choose another folder."
        ) from error
    finally:
        if made_here and repository.is_dir() and not any(repository.iterdir()):
            repository.rmdir()


@contextlib.contextmanager
def _stage_of(repository: Path, command: str) -> Iterator[tuple[Path, bool]]:
    """Yield a new stage under the lock, and whether the lock was taken here."""
    with repository_lock(repository, command) as is_outermost:
        parent = repository.resolve().parent
        beside = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
        prefix = _stage_prefix(repository)
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent if beside else repository.resolve()))
        try:
            yield stage, is_outermost
        finally:
            _to_the_end(lambda: _remove_stage(repository, stage, with_bytecode=is_outermost))


def _remove_stage(repository: Path, stage: Path, *, with_bytecode: bool) -> None:
    """Remove a stage, unless a journal that is left takes files from it."""
    if with_bytecode and stage.is_dir():
        _remove_bytecode(repository, stage)
    if not is_named_by_journal(stage, repository):
        shutil.rmtree(stage, ignore_errors=True)


def has_leftovers(repository: Path) -> bool:
    """Check for a lock file or a stage: a running command has both, and a killed one leaves them."""
    return (repository / LOCK_FILE).exists() or any(_stages(repository))


def _stages(repository: Path) -> Iterator[Path]:
    for parent in {repository.resolve(), repository.resolve().parent}:
        yield from parent.glob(f"{glob.escape(_stage_prefix(repository))}*")


def _stage_prefix(repository: Path) -> str:
    return f".{repository.resolve().name}.staging-"


def _sweep(repository: Path, stage: Path) -> None:
    """Remove what killed commands left: stages and unfinished files, whose writers held the lock."""
    for path in _stages(repository):
        if path != stage:
            shutil.rmtree(path, ignore_errors=True)
    for folder in [repository, *(path for path in repository.iterdir() if path.is_dir())]:
        remove_unfinished(folder)


def _remove_bytecode(repository: Path, stage: Path) -> None:
    """Move folders of front ends to ``stage`` of which nothing is left but bytecode.

    A front end that is still being loaded while its folder is removed makes it anew: Python creates the
    parents of ``__pycache__``. Triton's processes ignore the variable that would switch it off.
    """
    folders = [path for modality in Modality for path in repository.glob(f"*_{modality.value}")]
    versions = [path for folder in folders for path in folder.glob("[0-9]*") if path.is_dir()]
    for path in (*versions, *folders):
        if _is_only_bytecode(path):
            with contextlib.suppress(OSError):
                path.rename(stage / f"bytecode-{path.name}-{os.urandom(4).hex()}")
                if path in versions and not any(path.parent.iterdir()):
                    path.parent.rmdir()


def _is_only_bytecode(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return bool(files) and all(path.parent.name == "__pycache__" for path in files)


def relative_path(path: Path, repository: Path) -> str:
    """Return a path relative to a repository, as journals name it; it may lie beside."""
    return os.path.relpath(path.resolve(), repository.resolve())


def commit(stage: Path, repository: Path, name: str, work: str, moves: Mapping[Path, Path]) -> None:
    """Rename files and folders of a stage into a repository, all of them even if the process is killed.

    Args:
        name: Model that is changed; ``work`` is the change in words, for messages.
        moves: Path in the stage → path in the repository, in this order: the manifest last.
    """
    pairs = tuple(
        (relative_path(a, repository), b.relative_to(repository).as_posix()) for a, b in moves.items()
    )
    journal = ChangeJournal(name, work, WorkOutcome.FINISHED, FileChange(moves=pairs))
    write_journal(repository, stage, journal)
    finish(repository, stage, journal)


def finish(repository: Path, stage: Path, journal: ChangeJournal) -> ChangeJournal:
    """Carry a journal out, to its end even if this is interrupted by a signal; return what is left of it."""
    return _to_the_end(lambda: carried_out(repository, stage, journal))


def _to_the_end(step: Callable[[], Result]) -> Result:
    """Take a step that may be taken again, and take it again if a signal interrupts it."""
    try:
        return step()
    except Exception:
        raise
    except BaseException:  # Ctrl-C, a signal
        step()
        raise


def publish(stage: Path, repository: Path, manifest: Manifest, variant: Variant) -> None:
    """Rename a variant's towers and probes into the repository, and the manifest last.

    Readers of the manifest thus always find the files that it lists.
    """
    draft = stage / f"{manifest.name}.publish.json"
    draft.write_text(manifest.to_json(), encoding="utf-8")
    towers = (variant.text.model, variant.image.model, *(probes.path for probes in manifest.probes))
    moves = {stage / path: repository / path for path in towers}
    model = repository / manifest.name
    commit(stage, repository, manifest.name, "export", {**moves, draft: manifest_path(model)})


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


def with_config_records(manifest: Manifest, repository: Path, drafts: Path | None = None) -> Manifest:
    """Return a manifest with fresh checksums of its configurations.

    Args:
        drafts: Folder with configurations that will replace those of the repository.
    """
    variants = {key: variant_with_configs(v, repository, drafts) for key, v in manifest.variants.items()}
    front_ends = tuple(_with_config(found, repository, drafts) for found in manifest.front_ends)
    return dataclasses.replace(manifest, variants=variants, front_ends=front_ends)


def variant_with_configs(variant: Variant, repository: Path, drafts: Path | None = None) -> Variant:
    """Return a variant with fresh checksums of its towers' configurations; see ``with_config_records``."""
    text, image = (_with_config(tower, repository, drafts) for tower in (variant.text, variant.image))
    return dataclasses.replace(variant, text=text, image=image)


def _with_config(listed: Listed, repository: Path, drafts: Path | None) -> Listed:
    files = tuple(
        record_with_drafts(repository, repository / record.path, drafts)
        if record.path.endswith(f"/{CONFIG_FILE}")
        else record
        for record in listed.files
    )
    return dataclasses.replace(listed, files=files)


def record_with_drafts(repository: Path, path: Path, drafts: Path | None) -> FileRecord:
    """Return the record of a file, of its draft if there is one."""
    if drafts is not None and (draft := drafts / path.relative_to(repository)).is_file():
        return record_of_file(drafts, draft)
    return record_of_file(repository, path)
