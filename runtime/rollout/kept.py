"""Rollback to a version kept in the repository: probed and switched like a new one, without copies."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ManifestError
from runtime.manifest import KeptVersion, Manifest, Modality, Variant, verify_file
from runtime.rollout.release import Release
from runtime.storage import copy_folder
from runtime.triton_config import CONFIG_FILE, config_of_folder, served_version

__all__ = ["KeptRelease", "release_from_version"]


@dataclass(frozen=True, slots=True)
class KeptRelease(Release):
    """Previously served version of REPOSITORY/NAME."""

    kept: KeptVersion

    @property
    def variant(self) -> Variant:
        """Variant kept in the manifest."""
        return self.kept.variant

    @property
    def origin(self) -> str:
        """Origin of the version, for messages."""
        return "kept in the repository"

    def tower_folder(self, modality: Modality) -> Path:
        """Return the folder of a tower."""
        return self.repository / self.kept.variant.tower(modality).model

    def tower_version(self, modality: Modality) -> int:
        """Return the tower version that the front ends call."""
        return self.kept.variant.tower(modality).version

    def verify(self) -> None:
        """Verify the checksums of the towers' files, except configurations, which were rewritten since."""
        for modality in Modality:
            for record in self.variant.tower(modality).files:
                if not record.path.endswith(CONFIG_FILE):
                    verify_file(self.repository, record)
        self._verify_plans(self.repository)

    def added_folders(self, modality: Modality) -> tuple[Path, ...]:
        """Return the folder of the trial; all others are in the repository."""
        return (self.front_end_folder(modality, trial=True),)

    def write_folders(self, stage: Path) -> None:
        """Write the front ends of the trial to ``stage``."""
        for modality in Modality:
            served = self.front_end_folder(modality)
            folder = stage / self.front_end_folder(modality, trial=True).name
            folder.mkdir()
            copy_folder(served / str(self.version), folder / str(self.version))
            self._write_front_end_config(folder, served, modality, trial=True)

    def front_end_origin(self, modality: Modality) -> Path:
        """Return the served front end: its settings stay as they are."""
        return self.front_end_folder(modality)

    def front_end_facts(self, modality: Modality) -> dict[str, str]:
        """Return the parameters of this version's variant; all others stay as currently served."""
        return {
            "babeltower_variant": self.key,
            "babeltower_precision": self.variant.precision.value,
            "babeltower_engine": config_of_folder(self.tower_folder(modality)).backend,
        }


def release_from_version(model: Path, version: int) -> KeptRelease:
    """Plan to serve a kept version again; nothing is written.

    Raises:
        ManifestError: it is already served, was never served, or its files are missing.
    """
    manifest = Manifest.read(model)
    if not manifest.front_ends:
        raise ManifestError(f"{model} has no front ends. Run: babeltower frontends {shlex.quote(str(model))}")
    served = served_version(model.parent / manifest.front_ends[0].text)
    if version == served:
        raise ManifestError(f"{model} already serves version {version}. Pass another version.")
    found = {kept.version: kept for kept in manifest.kept}
    if version not in found:
        raise ManifestError(
            f"{model} has no version {version}; it serves {served} and has kept {sorted(found)}. Roll out a "
            "new version with --to REPOSITORY/NAME."
        )
    kept = found[version]
    release = KeptRelease(model.parent, manifest, model, manifest, kept.key, version, served, kept)
    for modality in Modality:
        for folder in (
            release.tower_folder(modality) / str(release.tower_version(modality)),
            release.front_end_folder(modality) / str(version),
        ):
            if not folder.is_dir():
                raise ManifestError(f"{folder} is missing, so version {version} cannot be served again.")
    return release
