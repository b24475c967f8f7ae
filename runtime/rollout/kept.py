"""A version that lies in the repository already: asked and switched to as a new one is, without a copy."""

from __future__ import annotations

import shutil
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
    """A version of REPOSITORY/NAME that was served before."""

    kept: KeptVersion

    @property
    def variant(self) -> Variant:
        """As the manifest has kept it."""
        return self.kept.variant

    @property
    def origin(self) -> str:
        """For messages."""
        return "which the repository kept"

    def tower_folder(self, modality: Modality) -> Path:
        """Where its tower is."""
        return self.repository / self.kept.variant.tower(modality).model

    def tower_version(self, modality: Modality) -> int:
        """The version of the tower that its front ends call."""
        return self.kept.variant.tower(modality).version

    def verify(self) -> None:
        """Compare its towers' files with their checksums; configurations have been written anew since."""
        for modality in Modality:
            for record in self.variant.tower(modality).files:
                if not record.path.endswith(CONFIG_FILE):
                    verify_file(self.repository, record)
        self._verify_plans(self.repository)

    def verify_copies(self) -> None:
        """There are none."""

    def put_towers_in(self) -> None:
        """They are in."""

    def put_front_end_in(self, modality: Modality, *, trial: bool) -> None:
        """Make the version of a front end the one to be loaded; copied for the trial alone."""
        served = self.front_end_folder(modality)
        folder = self.front_end_folder(modality, trial=trial)
        if trial:
            folder.mkdir(exist_ok=True)
            copy_folder(served / str(self.version), folder / str(self.version))
        self._write_front_end_config(folder, served, modality, trial=trial)

    def front_end_facts(self, modality: Modality) -> dict[str, str]:
        """The version's own variant; all else is as it is served now."""
        return {
            "babeltower_variant": self.key,
            "babeltower_precision": self.variant.precision.value,
            "babeltower_engine": config_of_folder(self.tower_folder(modality)).backend,
        }

    def take_out(self, *, trial_only: bool) -> None:
        """Remove the trial; the version stays, as it was there before."""
        for modality in Modality:
            shutil.rmtree(self.front_end_folder(modality, trial=True), ignore_errors=True)


def release_from_version(model: Path, version: int) -> KeptRelease:
    """Plan to serve a version again; nothing is written.

    Raises:
        ManifestError: it is served now, was never served, or its files are gone.
    """
    manifest = Manifest.read(model)
    if not manifest.front_ends:
        raise ManifestError(f"{model} is served by no front ends. Run: babeltower frontends {model}")
    served = served_version(model.parent / manifest.front_ends[0].text)
    if version == served:
        raise ManifestError(f"{model} serves version {version} already.")
    found = {kept.version: kept for kept in manifest.kept}
    if version not in found:
        raise ManifestError(
            f"{model} kept no version {version}; it serves {served} and kept {sorted(found)}. A new one "
            "comes in with --to REPOSITORY/NAME."
        )
    kept = found[version]
    release = KeptRelease(model.parent, manifest, model, manifest, kept.key, version, served, kept)
    for modality in Modality:
        for folder in (
            release.tower_folder(modality) / str(release.tower_version(modality)),
            release.front_end_folder(modality) / str(version),
        ):
            if not folder.is_dir():
                raise ManifestError(f"{folder} is gone, so version {version} cannot be served again.")
    return release
