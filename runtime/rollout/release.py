"""Files of a version: written to a stage whole, and the configurations that make it the served one.

Every ``config.pbtxt`` pins the versions that a server loads, so a server that restarts during a rollout
serves the old version, not the highest one.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.plan_checks import require_plan_of_tower
from runtime.errors import ManifestError
from runtime.fingerprints import remark_on_models, same_space
from runtime.manifest import (
    FRONT_END_FILE,
    FileRecord,
    FrontEnds,
    KeptVersion,
    Manifest,
    Modality,
    TowerFiles,
    Variant,
    front_end_name,
    tower_folder_name,
    trial_name,
    verify_file,
)
from runtime.repository import record_with_drafts
from runtime.storage import copy_folder
from runtime.triton_config import (
    CONFIG_FILE,
    config_of_folder,
    served_version,
    versions_of_folder,
    write_config_from,
)

__all__ = ["Release", "release_from_model"]


@dataclass(frozen=True, slots=True)
class Release:
    """Version of REPOSITORY/NAME that is being rolled out.

    Attributes:
        source: Model with the new version.
        key: Key of its variant in both manifests.
        version: Number of the new version.
        served: Currently served version of the front ends.
    """

    repository: Path
    manifest: Manifest
    source: Path
    candidate: Manifest
    key: str
    version: int
    served: int

    @property
    def trial_name(self) -> str:
        """Name under which the version is probed before it gets traffic."""
        return trial_name(self.manifest.name)

    @property
    def variant(self) -> Variant:
        """Variant in the candidate's manifest."""
        return self.candidate.variants[self.key]

    @property
    def origin(self) -> str:
        """Origin of the version, for messages."""
        return f"from {self.source}"

    def tower_folder(self, modality: Modality) -> Path:
        """Return the target folder of a tower."""
        return self.repository / tower_folder_name(self.manifest.name, modality, self.key)

    def tower_version(self, modality: Modality) -> int:
        """Return the tower's version, the same as the release's."""
        return self.version

    def front_end_folder(self, modality: Modality, *, trial: bool = False) -> Path:
        """Return the target folder of a front end."""
        name = self.trial_name if trial else self.manifest.name
        return self.repository / front_end_name(name, modality)

    def folders(self) -> tuple[Path, ...]:
        """Return all folders of the model that the rollout changes."""
        return tuple(
            folder
            for modality in Modality
            for folder in (self.tower_folder(modality), self.front_end_folder(modality))
        )

    def verify(self) -> None:
        """Verify the checksums of the version's files at their source.

        Raises:
            ManifestError: a file is missing, truncated or changed.
            EngineError: a plan was built from another graph.
        """
        repository = self.source.parent
        self.candidate.verify(repository, self.variant)
        self.candidate.verify_front_ends(repository)
        self._verify_plans(repository)

    def _verify_plans(self, repository: Path) -> None:
        if "tensorrt" in self.variant.engines:
            for modality in Modality:
                require_plan_of_tower(repository, self.variant.tower(modality))

    def added_folders(self, modality: Modality) -> tuple[Path, ...]:
        """Return the folders that the version adds: of its tower, its front end and the trial."""
        tower = self.tower_folder(modality)
        front_end = self.front_end_folder(modality) / str(self.version)
        added = tower / str(self.version) if tower.exists() else tower
        return added, front_end, self.front_end_folder(modality, trial=True)

    def write_folders(self, stage: Path) -> None:
        """Write all folders that the version adds to ``stage``, under the repository's names, and check them.

        Raises:
            ManifestError: a copy is truncated or damaged.
            OSError: the disk is full.
        """
        for modality in Modality:
            self._write_tower(modality, stage)
            self._write_front_end(modality, stage)

    def _write_tower(self, modality: Modality, stage: Path) -> None:
        tower = self.variant.tower(modality)
        origin, name = self.source.parent / tower.model, self.tower_folder(modality).name
        folder = stage / name
        folder.mkdir()
        if not self.tower_folder(modality).exists():
            write_config_from(origin, folder, versions=[self.version])
            for file in _own_files(origin):
                if file.name != CONFIG_FILE:
                    target = folder / file.relative_to(origin)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
        copy_folder(origin / str(tower.version), folder / str(self.version))
        prefix = f"{tower.model}/{tower.version}/"
        for record in tower.files:
            if record.path.startswith(prefix):
                path = f"{name}/{self.version}/{record.path.removeprefix(prefix)}"
                verify_file(stage, dataclasses.replace(record, path=path))

    def _write_front_end(self, modality: Modality, stage: Path) -> None:
        origin = self.source.parent / front_end_name(self.candidate.name, modality)
        for trial in (False, True):
            folder = stage / self.front_end_folder(modality, trial=trial).name
            folder.mkdir()
            copy_folder(
                origin / str(served_version(origin)), folder / str(self.version), adapt=self._bind(modality)
            )
            if trial:
                self._write_front_end_config(folder, origin, modality, trial=True)

    def _write_front_end_config(self, folder: Path, origin: Path, modality: Modality, *, trial: bool) -> None:
        parameters = {
            "babeltower_name": self.trial_name if trial else self.manifest.name,
            "babeltower_tower": self.tower_folder(modality).name,
        }
        write_config_from(
            origin,
            folder,
            versions=[self.version],
            parameters={**parameters, **self.front_end_facts(modality)},
        )

    def front_end_facts(self, modality: Modality) -> dict[str, str]:
        """Return parameters that this version changes in a front end's configuration."""
        return {}

    def _bind(self, modality: Modality) -> Any:
        def bound(version_folder: Path) -> None:
            path = version_folder / FRONT_END_FILE
            spec = json.loads(path.read_text(encoding="utf-8"))
            spec["tower"] |= {"model": self.tower_folder(modality).name, "version": self.version}
            path.write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

        return bound

    def front_end_origin(self, modality: Modality) -> Path:
        """Return the front end whose settings the version takes over."""
        return self.source.parent / front_end_name(self.candidate.name, modality)

    def write_served_configs(self, drafts: Path) -> list[Path]:
        """Write the configurations that make this version the served one, and return their drafts."""
        found = []
        for modality in Modality:
            tower, front_end = self.tower_folder(modality), self.front_end_folder(modality)
            for folder in (tower, front_end):
                (drafts / folder.name).mkdir()
                found.append(drafts / folder.name / CONFIG_FILE)
            write_config_from(tower, drafts / tower.name, versions=[self.tower_version(modality)])
            self._write_front_end_config(
                drafts / front_end.name, self.front_end_origin(modality), modality, trial=False
            )
        return found

    def write_pinned_configs(self, drafts: Path) -> list[Path]:
        """Write configurations that pin the served versions where none is pinned; return their drafts."""
        found = []
        for folder in self.folders():
            if folder.exists():
                served = served_version(folder)
                if list(config_of_folder(folder).version_policy.specific.versions) != [served]:
                    (drafts / folder.name).mkdir()
                    write_config_from(folder, drafts / folder.name, versions=[served])
                    found.append(drafts / folder.name / CONFIG_FILE)
        return found

    def finished_manifest(self, drafts: Path) -> Manifest:
        """Return the model's manifest with this version as the served one.

        Args:
            drafts: Folder with the configurations that make it so.
        """
        towers = {modality: self._tower_files(modality, drafts) for modality in Modality}
        text = towers[Modality.TEXT]
        tokenizer = f"{text.model}/{Path(self.variant.tokenizer).name}"
        variant = dataclasses.replace(
            self.variant, text=text, image=towers[Modality.IMAGE], tokenizer=tokenizer
        )
        text_name, image_name = (self.front_end_folder(m).name for m in (Modality.TEXT, Modality.IMAGE))
        records = [
            record
            for name in (text_name, image_name)
            for record in _records(self.repository, self.repository / name, self.version, drafts)
        ]
        return dataclasses.replace(
            self.manifest,
            variants={**self.manifest.variants, self.key: variant},
            front_ends=(FrontEnds(self.key, text_name, image_name, tuple(records)),),
            kept=self._kept(),
        )

    def _kept(self) -> tuple[KeptVersion, ...]:
        """Return the versions kept for rollback: earlier ones, and the one served until now."""
        (front_ends,) = self.manifest.front_ends
        key = front_ends.variant
        served = KeptVersion(self.served, key, self.manifest.variants[key])
        others = [kept for kept in self.manifest.kept if kept.version not in (self.version, served.version)]
        return (*others, served)

    def _tower_files(self, modality: Modality, drafts: Path) -> TowerFiles:
        folder = self.tower_folder(modality)
        return dataclasses.replace(
            self.variant.tower(modality),
            model=folder.name,
            version=self.tower_version(modality),
            files=tuple(_records(self.repository, folder, self.tower_version(modality), drafts)),
        )


def release_from_model(model: Path, source: Path, key: str | None = None) -> Release:
    """Plan the rollout of a new version; nothing is written.

    Raises:
        ManifestError: the embedding space differs, the variant does not exist, or front ends are missing.
    """
    manifest, candidate = Manifest.read(model), Manifest.read(source)
    if manifest.fingerprint != candidate.fingerprint and same_space(
        manifest.fingerprint, candidate.fingerprint
    ):
        raise ManifestError(
            f"{source} has another part of the vocabulary than {model}: their vectors are comparable, but a "
            "release keeps the tokens of the one before. Serve it under another name."
        )
    if manifest.fingerprint != candidate.fingerprint:
        raise ManifestError(
            f"{source} embeds into space {candidate.fingerprint!r}, but {model} into "
            f"{manifest.fingerprint!r}. Its vectors are not comparable with existing ones: serve it under "
            "another name, and embed everything again."
            + remark_on_models(candidate.fingerprint, manifest.fingerprint)
        )
    if key is None and len(candidate.variants) > 1:
        raise ManifestError(f"{source} has variants {sorted(candidate.variants)}; pass --variant.")
    key = key or next(iter(candidate.variants))
    if key not in candidate.variants:
        raise ManifestError(f"{source} has no variant {key!r}; it has {sorted(candidate.variants)}.")
    release = Release(model.parent, manifest, source, candidate, key, version=0, served=0)
    for parent, name in ((model.parent, manifest.name), (source.parent, candidate.name)):
        for modality in Modality:
            folder = parent / front_end_name(name, modality)
            if not (folder / CONFIG_FILE).is_file() or not versions_of_folder(folder):
                raise ManifestError(
                    f"{folder} is missing or not a front end. Run babeltower frontends first."
                )
    if not manifest.front_ends:
        raise ManifestError(f"{model} has no front ends. Run: babeltower frontends {shlex.quote(str(model))}")
    taken = [v for folder in release.folders() if folder.exists() for v in versions_of_folder(folder)]
    served = served_version(release.front_end_folder(Modality.TEXT))
    return dataclasses.replace(release, version=max(taken) + 1, served=served)


def _records(repository: Path, folder: Path, version: int, drafts: Path) -> list[FileRecord]:
    graph = [path for path in (folder / str(version)).rglob("*") if path.is_file()]
    return [record_with_drafts(repository, path, drafts) for path in sorted([*_own_files(folder), *graph])]


def _own_files(folder: Path) -> list[Path]:
    """List a Triton model's files outside its versions: configuration, tokenizer, warm-up tensors."""
    tops = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.name.isdecimal()]
    return [file for top in tops for file in ([top] if top.is_file() else top.rglob("*")) if file.is_file()]
