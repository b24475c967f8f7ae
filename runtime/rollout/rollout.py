"""Sequence of a rollout: add a version, probe it, switch to it; any failure rolls everything back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.encoder import Encoder
from runtime.errors import BabeltowerError, InputError, ManifestError, RolloutError
from runtime.manifest import Modality, manifest_path
from runtime.probes import Probes
from runtime.remote.options import Connection, address_from_text
from runtime.repository import write_manifest
from runtime.rollout.control import Control
from runtime.rollout.gate import ProbeVerdict, limits_from_variant, verdict_of_encoder
from runtime.rollout.kept import release_from_version
from runtime.rollout.release import Release, release_from_model
from runtime.triton_config import CONFIG_FILE, served_version

__all__ = ["Rollout", "roll_out"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Version that was switched to, and its probe verdicts before and after the switch."""

    model: Path
    version: int
    before: ProbeVerdict
    after: ProbeVerdict


def roll_out(
    model: str | os.PathLike[str],
    to: str | os.PathLike[str] | int,
    *,
    url: str,
    variant: str | None = None,
    connection: Connection | None = None,
    say: Say = lambda _: None,
) -> Rollout:
    """Switch a served model to a new version under traffic, if its answers are correct.

    The checksums of its files are verified first. The new towers are loaded beside the old ones (our own
    backends then run their opening checks), with front ends under a trial name that gets no traffic. These
    are probed with the probes of REPOSITORY/NAME. If the answers pass, the front ends are switched and probed
    again, and the old towers are unloaded; their files stay. Otherwise everything is restored.

    Args:
        model: REPOSITORY/NAME, in the repository that the server reads.
        to: Model with the new version, of the same embedding space and with front ends; or the number of a
            previously served version whose files are kept in the repository.
        url: ``grpc://HOST:PORT`` of the server, which must allow loading of models (explicit control).
        variant: Variant of ``to``; optional if it has only one.
        say: Callback with a description of each step.

    Raises:
        RolloutError: the version's answers are wrong, or it does not load; the old one is served.
        ManifestError: the embedding space differs, or files are missing or changed; nothing was modified.
        EngineError: a plan was built from another graph.
        ServerError: the server cannot be reached, or does not allow loading of models.
    """
    model, connection = Path(model), connection or Connection()
    release = _planned(model, to, variant)
    records = release.manifest.probes
    probes = Probes.read(model, records[0] if records else None)
    if probes.fingerprint != release.manifest.fingerprint:
        raise ManifestError(
            f"The probes of {model} are of space {probes.fingerprint!r}, but the model is of "
            f"{release.manifest.fingerprint!r}. Export the checkpoint again."
        )
    say("verifying checksums")
    release.verify()
    base = url.rstrip("/")
    control = Control(address_from_text(f"{base}/{release.manifest.name}"), connection)
    try:
        return _Run(release, probes, control, base, connection, say).done()
    finally:
        control.close()


def _planned(model: Path, to: str | os.PathLike[str] | int, variant: str | None) -> Release:
    if not isinstance(to, int):
        return release_from_model(model, Path(to), variant)
    if variant is not None:
        raise InputError(f"Version {to} has a fixed variant; leave the variant out.")
    return release_from_version(model, to)


@dataclass(slots=True)
class _Run:
    release: Release
    probes: Probes
    control: Control
    base: str
    connection: Connection
    say: Say

    def done(self) -> Rollout:
        release = self.release
        kept = {path: path.read_bytes() for path in self._guarded_files()}
        loaded = {name for name in self._towers() if self.control.is_loaded(name)}
        try:
            self._pin_served()
            self.say(f"loading version {release.version} beside the served one")
            self._load_towers()
            self._load_trial()
            before = self._judged(release.trial_name)
            self.say("the probes pass; switching")
            self._switch()
            after = self._judged(release.manifest.name)
        except BaseException as error:
            self._go_back(kept, loaded)
            if isinstance(error, BabeltowerError):
                raise RolloutError(
                    f"Version {release.version} of {release.manifest.name}, {release.origin}, was rolled "
                    f"back; the previous version is still served. {error}"
                ) from error
            raise
        self._finish()
        return Rollout(release.repository / release.manifest.name, release.version, before, after)

    def _guarded_files(self) -> list[Path]:
        release = self.release
        configs = [folder / CONFIG_FILE for folder in release.folders() if folder.exists()]
        return [*configs, manifest_path(release.repository / release.manifest.name)]

    def _pin_served(self) -> None:
        """Pin the served versions, so that a server that restarts during the rollout loads no others."""
        for folder in self.release.folders():
            if folder.exists():
                self.release.pin(folder, [served_version(folder)])
        self._write_manifest()

    def _load_towers(self) -> None:
        release = self.release
        served = {folder: served_version(folder) for folder in release.folders() if folder.exists()}
        release.put_towers_in()
        release.verify_copies()
        for modality in Modality:
            folder, version = release.tower_folder(modality), release.tower_version(modality)
            release.pin(folder, sorted({served.get(folder, version), version}))
            self.control.load(folder.name)
        self._write_manifest()

    def _load_trial(self) -> None:
        for modality in Modality:
            self.release.put_front_end_in(modality, trial=True)
            self.control.load(self.release.front_end_folder(modality, trial=True).name)

    def _judged(self, name: str) -> ProbeVerdict:
        with Encoder.open(f"{self.base}/{name}", connection=self.connection) as encoder:
            verdict = verdict_of_encoder(encoder, self.probes, limits_from_variant(self.release.variant))
        if not verdict.holds:
            raise RolloutError("; ".join(verdict.faults) + ".")
        return verdict

    def _switch(self) -> None:
        for modality in Modality:
            self.release.put_front_end_in(modality, trial=False)
            self.control.load(self.release.front_end_folder(modality).name)

    def _finish(self) -> None:
        """Unload the trial and the old towers, which nothing calls any more, and write the manifest."""
        release = self.release
        for modality in Modality:
            self.control.unload(release.front_end_folder(modality, trial=True).name)
        release.take_out(trial_only=True)
        for modality in Modality:
            folder = release.tower_folder(modality)
            release.pin(folder, [release.tower_version(modality)])
            self.control.load(folder.name)
        for name in set(self._towers_served()) - set(self._towers()):
            self.control.unload(name)
        write_manifest(release.repository / release.manifest.name, release.finished_manifest())

    def _towers(self) -> list[str]:
        """Return the Triton models of the version's towers."""
        return [self.release.tower_folder(modality).name for modality in Modality]

    def _towers_served(self) -> list[str]:
        """Return the Triton models of the towers served until now; another variant has other names."""
        manifest = self.release.manifest
        served = manifest.variants[manifest.front_ends[0].variant]
        return [served.tower(modality).model for modality in Modality]

    def _go_back(self, kept: dict[Path, bytes], loaded: set[str]) -> None:
        """Restore the files first, so that a restarting server is correct, then the loaded models."""
        release = self.release
        self.say("rolling back")
        for path, content in kept.items():
            path.write_bytes(content)
        faults = []
        for modality in Modality:
            for step, name in (
                (self.control.unload, release.front_end_folder(modality, trial=True).name),
                (self.control.load, release.front_end_folder(modality).name),
            ):
                faults += self._tried(step, name)
        release.take_out(trial_only=False)
        for name in self._towers():
            faults += self._tried(self.control.load if name in loaded else self.control.unload, name)
        for fault in faults:
            self.say(f"while rolling back: {fault}")

    @staticmethod
    def _tried(step: Callable[[str], None], name: str) -> list[str]:
        try:
            step(name)
        except BabeltowerError as error:
            return [str(error)]
        return []

    def _write_manifest(self) -> None:
        write_manifest(self.release.repository / self.release.manifest.name, self.release.manifest)
