"""Sequence of a rollout: add a version, probe it, switch to it; any failure rolls everything back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.encoder import Encoder
from runtime.errors import BabeltowerError, InputError, ManifestError, RolloutError
from runtime.manifest import Manifest, Modality, front_end_name, manifest_path
from runtime.probes import Probes
from runtime.remote.options import Connection, address_from_text
from runtime.repository import finish, relative_path, staging, with_config_records
from runtime.rollout.control import Control
from runtime.rollout.gate import ProbeVerdict, limits_from_variant, verdict_of_encoder
from runtime.rollout.kept import release_from_version
from runtime.rollout.release import Release, release_from_model
from runtime.rollout.settling import Say, settle, tell_server
from runtime.transaction import (
    ChangeJournal,
    FileChange,
    LiveModels,
    WorkOutcome,
    journals_of_repository,
    make_change,
    remove_journal,
    write_journal,
)
from runtime.triton_config import config_of_folder, served_version

__all__ = ["Rollout", "roll_out", "undo_rollout"]


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

    The files say what is served before and after, never anything between: a rollout that is killed is undone
    or finished by the next command, ``serve`` among them.

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
        RepositoryInUseError: another command changes the repository.
        ExportError: the repository cannot be written, or its disk is full; the old version is served.
        EngineError: a plan was built from another graph.
        ServerError: the server cannot be reached, or does not allow loading of models.
    """
    model, connection = Path(model), connection or Connection()
    Manifest.read(model)  # before anything is written
    with staging(model.parent, "rollout") as stage:
        control = _control(model, url, connection)
        try:
            control.require_serving(_front_ends_of(model), model.name)
            settle(model.parent, stage, control, say)
            return _switched(_planned(model, to, variant), stage, control, url, connection, say)
        finally:
            control.close()


def undo_rollout(
    model: str | os.PathLike[str],
    *,
    url: str,
    connection: Connection | None = None,
    say: Say = lambda _: None,
) -> Rollout | None:
    """Undo the last rollout: switch back to the version served before, through the same checks.

    Returns:
        The switch; ``None`` if the last rollout was interrupted or failed, so that it was undone already.

    Raises:
        ManifestError: no version was served before.
        BabeltowerError: as ``roll_out``.
    """
    model, connection = Path(model), connection or Connection()
    Manifest.read(model)
    with staging(model.parent, "rollout --undo") as stage:
        control = _control(model, url, connection)
        try:
            control.require_serving(_front_ends_of(model), model.name)
            undone = [
                journal
                for journal in settle(model.parent, stage, control, say)
                if journal.name == model.name and journal.outcome is WorkOutcome.UNDONE
            ]
            if undone:
                remove_journal(model.parent, model.name)
                return None
            manifest = Manifest.read(model)
            if not manifest.kept:
                raise ManifestError(
                    f"{model} has not served another version, so there is none to go back to."
                )
            release = release_from_version(model, manifest.kept[-1].version)
            return _switched(release, stage, control, url, connection, say)
        finally:
            control.close()


def _control(model: Path, url: str, connection: Connection) -> Control:
    return Control(address_from_text(f"{url.rstrip('/')}/{model.name}"), connection)


def _front_ends_of(model: Path) -> list[str]:
    """Names of the front ends that a server of a model's repository has loaded; none if it has none."""
    if not Manifest.read(model).front_ends:
        return []
    return [front_end_name(model.name, modality) for modality in Modality]


def _planned(model: Path, to: str | os.PathLike[str] | int, variant: str | None) -> Release:
    if not isinstance(to, int):
        return release_from_model(model, Path(to), variant)
    if variant is not None:
        raise InputError(f"Version {to} has a fixed variant; leave the variant out.")
    return release_from_version(model, to)


def _switched(
    release: Release, stage: Path, control: Control, url: str, connection: Connection, say: Say
) -> Rollout:
    records = release.manifest.probes
    model = release.repository / release.manifest.name
    probes = Probes.read(model, records[0] if records else None)
    if probes.fingerprint != release.manifest.fingerprint:
        raise ManifestError(
            f"The probes of {model} are of space {probes.fingerprint!r}, but the model is of "
            f"{release.manifest.fingerprint!r}. Export the checkpoint again."
        )
    say("verifying checksums")
    release.verify()
    return _Run(release, probes, control, url.rstrip("/"), connection, say, stage).done()


@dataclass(slots=True)
class _Run:
    release: Release
    probes: Probes
    control: Control
    base: str
    connection: Connection
    say: Say
    stage: Path
    served: Mapping[str, int] = field(default_factory=dict)

    def done(self) -> Rollout:
        release = self.release
        self.served = {f.name: served_version(f) for f in release.folders() if f.exists()}
        loaded = {name for name in self._towers() if self.control.is_loaded(name)}
        try:
            self.say(f"loading version {release.version} beside the served one")
            self._put_in(loaded)
            self._load_beside()
            before = self._judged(release.trial_name)
            finished = self._prepared()
            self.say("the probes pass; switching")
            self._switch()
            after = self._judged(release.manifest.name)
            write_journal(release.repository, self.stage, finished)
        except BaseException as error:
            journal = self._ended()
            if journal is not None and journal.outcome is WorkOutcome.FINISHED:
                raise  # a signal came after the decision
            if isinstance(error, (BabeltowerError, OSError)):
                raise RolloutError(
                    f"Version {release.version} of {release.manifest.name}, {release.origin}, was rolled "
                    f"back; the previous version is still served. {error}"
                ) from error
            raise
        self._ended()
        return Rollout(release.repository / release.manifest.name, release.version, before, after)

    def _put_in(self, loaded: Iterable[str]) -> None:
        """Write everything to the stage, then the journal with the way back, then rename it in."""
        release, repository = self.release, self.release.repository
        added, pins, back = (self._folder(name) for name in ("added", "pins", "back"))
        release.write_folders(added)
        model = repository / release.manifest.name
        pinned = release.write_pinned_configs(pins)
        if pinned:
            manifest = with_config_records(release.manifest, repository, pins)
            pinned.append(manifest_path(pins / model.name))
            pinned[-1].write_text(manifest.to_json(), encoding="utf-8")
        for draft in pinned:
            former = back / draft.relative_to(pins)
            former.parent.mkdir(exist_ok=True)
            shutil.copyfile(repository / draft.relative_to(pins), former)
        folders = [folder for modality in Modality for folder in release.added_folders(modality)]
        undo = FileChange(
            remove=tuple(folder.relative_to(repository).as_posix() for folder in folders),
            moves=self._moves(back, [back / draft.relative_to(pins) for draft in pinned]),
        )
        towers = self._towers()
        live = LiveModels(
            load=(*self._front_ends(), *(name for name in towers if name in loaded)),
            unload=(*self._front_ends(trial=True), *(name for name in towers if name not in loaded)),
        )
        work = f"rollout to version {release.version}"
        write_journal(
            repository, self.stage, ChangeJournal(release.manifest.name, work, WorkOutcome.UNDONE, undo, live)
        )
        moves = (
            *self._moves(pins, pinned),  # first: else a restarting server would load the newest version
            *self._moves(added, [added / folder.relative_to(repository) for folder in folders]),
        )
        make_change(repository, self.stage, FileChange(moves=moves))

    def _load_beside(self) -> None:
        release = self.release
        for modality in Modality:
            folder, version = release.tower_folder(modality), release.tower_version(modality)
            config = config_of_folder(folder)
            served = self.served.get(folder.name, version)
            config.version_policy.specific.versions[:] = sorted({served, version})
            self.control.load(config)
        for modality in Modality:
            self.control.load(config_of_folder(release.front_end_folder(modality, trial=True)))

    def _judged(self, name: str) -> ProbeVerdict:
        with Encoder.open(f"{self.base}/{name}", connection=self.connection) as encoder:
            verdict = verdict_of_encoder(encoder, self.probes, limits_from_variant(self.release.variant))
        if not verdict.holds:
            raise RolloutError("; ".join(verdict.faults) + ".")
        return verdict

    def _prepared(self) -> ChangeJournal:
        """Write the files that make the version the served one, and return the journal that puts them in."""
        release, repository = self.release, self.release.repository
        drafts = self._folder("served")
        written = release.write_served_configs(drafts)
        model = repository / release.manifest.name
        written.append(manifest_path(drafts / model.name))
        written[-1].write_text(release.finished_manifest(drafts).to_json(), encoding="utf-8")
        trial = self._front_ends(trial=True)
        change = FileChange(remove=trial, moves=self._moves(drafts, written))
        towers = self._towers()
        live = LiveModels(
            load=(*self._front_ends(), *towers),
            unload=(*trial, *sorted(set(self._towers_served()) - set(towers))),
        )
        work = f"rollout to version {release.version}"
        return ChangeJournal(release.manifest.name, work, WorkOutcome.FINISHED, change, live)

    def _switch(self) -> None:
        """Load both front ends of the version; the files still say the former one."""
        drafts = self.stage / "served"
        for name in self._front_ends():
            self.control.load(config_of_folder(drafts / name))

    def _ended(self) -> ChangeJournal | None:
        """Carry out what the journal says, first on the files, then on the server; return it."""
        release = self.release
        journals = journals_of_repository(release.repository)
        journal = next((j for j in journals if j.name == release.manifest.name and not j.done), None)
        if journal is not None:
            if journal.outcome is WorkOutcome.UNDONE:
                self.say("rolling back")
                for name in self._front_ends():  # first: those of the version lose their files
                    self._tried(self.control.load, config_of_folder(release.repository / name))
            left = finish(release.repository, self.stage, journal)
            tell_server(release.repository, self.stage, left, self.control, self.say)
        return journal

    def _tried(self, step: Callable[[Any], None], config: Any) -> None:
        try:
            step(config)
        except BabeltowerError as error:
            self.say(f"while rolling back: {error}")

    def _moves(self, folder: Path, drafts: Iterable[Path]) -> tuple[tuple[str, str], ...]:
        """Return the moves of drafts to their places in the repository."""
        return tuple(
            (relative_path(draft, self.release.repository), draft.relative_to(folder).as_posix())
            for draft in drafts
        )

    def _folder(self, name: str) -> Path:
        folder = self.stage / name
        folder.mkdir()
        return folder

    def _towers(self) -> tuple[str, ...]:
        """Return the Triton models of the version's towers."""
        return tuple(self.release.tower_folder(modality).name for modality in Modality)

    def _front_ends(self, *, trial: bool = False) -> tuple[str, ...]:
        return tuple(self.release.front_end_folder(modality, trial=trial).name for modality in Modality)

    def _towers_served(self) -> tuple[str, ...]:
        """Return the Triton models of the towers served until now; another variant has other names."""
        manifest = self.release.manifest
        served = manifest.variants[manifest.front_ends[0].variant]
        return tuple(served.tower(modality).model for modality in Modality)
