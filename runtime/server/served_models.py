"""Triton models that a server loads: those that the manifests name, in a folder that every program can read.

Triton treats every folder of its repository as a model, stops if one of them is none, and starts the Python
models through a shell that the folder's path is not quoted for. So a server gets a folder of its own, with a
link to each model, at a path without special characters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import BabeltowerError, EngineError, ManifestError
from runtime.manifest import Manifest, Modality, names_in_repository
from runtime.server.checks import verify_files_of_manifest
from runtime.server.devices import towers_of_repository
from runtime.triton_config import CONFIG_FILE

__all__ = ["ServedModels", "linked_repository", "readable_models", "served_models"]


@dataclass(frozen=True, slots=True)
class ServedModels:
    """Selection of a repository's models.

    Attributes:
        names: Models of babeltower to serve.
        folders: Triton models to load: their front ends and towers.
        broken: Models that cannot be served, each with the reason.
        foreign: Other folders of the repository, which are left alone.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    def remarks(self) -> Iterator[str]:
        """Yield a line for each broken model, and one for the foreign folders."""
        for name, reason in self.broken.items():
            yield f"left out: {name}: {reason}"
        if self.foreign:
            yield f"left alone, since no manifest names them: {', '.join(self.foreign)}"

    def without(self, folder: str, reason: str, repository: Path) -> ServedModels | None:
        """Return the selection without the model that a Triton model belongs to; ``None`` if none remains."""
        owners = [name for name in self.names if folder in folders_of_manifest(repository, name)]
        kept = tuple(name for name in self.names if name not in owners)
        if not kept:
            return None
        theirs = {f for name in owners for f in folders_of_manifest(repository, name)}
        return ServedModels(
            kept,
            tuple(f for f in self.folders if f not in theirs),
            {**self.broken, **dict.fromkeys(owners, reason)},
            self.foreign,
        )


def served_models(
    repository: Path, models: Collection[str] | None, *, verify: bool, leave_broken: bool
) -> ServedModels:
    """Select the Triton models that a server loads, and verify the checksums of their files.

    Args:
        models: Triton models to load; ``None`` for the front ends and towers that the manifests name. A
            repository without manifests is taken whole.
        leave_broken: Leave out a model whose manifest or files are damaged, if another one remains.

    Raises:
        ManifestError: a manifest or a file is damaged, and the model is not left out.
        EngineError: a plan was built from another graph.
    """
    names: list[str] = []
    named: dict[str, None] = {}
    failures: dict[str, BabeltowerError] = {}
    for name in names_in_repository(repository):
        try:
            require_readable(repository, name)
            if verify:
                verify_files_of_manifest(repository, Manifest.read(repository / name), models)
        except BabeltowerError as error:
            failures[name] = error
            continue
        names.append(name)
        named |= dict.fromkeys(folders_of_manifest(repository, name))
    if failures and not (leave_broken and names):
        raise next(iter(failures.values()))
    broken = {name: str(error) for name, error in failures.items()}
    configured = [path.parent.name for path in sorted(repository.glob(f"*/{CONFIG_FILE}"))]
    if models is not None:
        unserved = {f for name in broken for f in _folders_of_broken(repository, name)}
        wanted = tuple(model for model in models if model not in unserved)
    elif names or broken:
        wanted = tuple(named)
    else:
        wanted = tuple(configured)
    return ServedModels(tuple(names), wanted, broken, _foreign(repository, names, broken, wanted))


def readable_models(repository: Path) -> list[str]:
    """Names of the models whose manifest and configurations can be read."""
    names = []
    for name in names_in_repository(repository):
        with contextlib.suppress(ManifestError):
            require_readable(repository, name)
            names.append(name)
    return names


def require_readable(repository: Path, name: str) -> None:
    """Check that a model's manifest, and its towers' configurations as far as we read them, are valid.

    Raises:
        ManifestError: one is malformed.
    """
    for _ in towers_of_repository(repository, [name]):
        pass


def folders_of_manifest(repository: Path, name: str) -> list[str]:
    """Names of the Triton models that a model's manifest lists and that are there: front ends, then towers.

    Raises:
        ManifestError: it is malformed.
    """
    manifest = Manifest.read(repository / name)
    listed = [model for served in manifest.front_ends for model in (served.text, served.image)]
    listed += [v.tower(modality).model for v in manifest.variants.values() for modality in Modality]
    return [model for model in dict.fromkeys(listed) if (repository / model).is_dir()]


def _folders_of_broken(repository: Path, name: str) -> list[str]:
    """Names of a broken model's Triton models, as far as its manifest can be read."""
    with contextlib.suppress(ManifestError):
        return folders_of_manifest(repository, name)
    return []


def _foreign(
    repository: Path, names: Collection[str], broken: Mapping[str, str], wanted: Collection[str]
) -> tuple[str, ...]:
    """Names of the folders that belong to no model; those of a broken model cannot always be known."""
    known = set(wanted)
    for name in names:
        manifest = Manifest.read(repository / name)
        kept = (found.variant for found in manifest.kept)
        known |= {v.tower(m).model for v in (*manifest.variants.values(), *kept) for m in Modality}
        known |= set(folders_of_manifest(repository, name))
    prefixes = tuple(f"{name}_" for name in broken)
    return tuple(
        path.name
        for path in sorted(repository.iterdir())
        if path.is_dir() and path.name not in known and not path.name.startswith(prefixes or ("\0",))
    )


def linked_repository(repository: Path, folders: Collection[str], target: Path, *, whole: bool) -> Path:
    """Make a repository for Triton at a plain path.

    Args:
        whole: Link the repository itself, so that models that are added later can be loaded; otherwise
            ``folders`` only.

    Returns:
        ``target``.

    Raises:
        EngineError: a folder is not there.
    """
    if whole:
        target.symlink_to(repository)
        return target
    target.mkdir()
    for folder in folders:
        if not (repository / folder).is_dir():
            raise EngineError(f"{repository} has no Triton model {folder!r}; it cannot be loaded.")
        (target / folder).symlink_to(repository / folder)
    return target
