"""Rollouts killed at random moments under traffic: never a mixed pair, and always a way on and back.

``BABELTOWER_KILLS`` is the number of kills; the default is a few, for a run of minutes.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tritonclient.grpc
from altered_models import copied
from sample_models import Exported
from serving import Serving, rollout_process, wait_until
from traffic import Traffic
from tritonclient.utils import InferenceServerException

from runtime.manifest import Manifest, Modality, front_end_name
from runtime.probes import Probes
from runtime.remote import Connection
from runtime.repository_lock import LOCK_FILE, repository_lock
from runtime.rollout.kept import release_from_version
from runtime.server import ServerEnvironment
from runtime.transaction import journals_of_repository
from runtime.triton_config import served_version

NAME = "nllb-clip"
N_KILLS = int(os.environ.get("BABELTOWER_KILLS", "9"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


class Served:
    """A served model that is killed over and over, and the model that it is rolled out to."""

    def __init__(self, model: Path, new: Path, environment: ServerEnvironment) -> None:
        self.model, self.new, self._environment = model, new, environment
        self.serving: Serving | None = None
        self._ports = ("0", "0", "0")

    def start(self) -> None:
        """Start the server, at the ports that it had before."""
        http, grpc, metrics = self._ports
        arguments = ("--control", "--port", http, "--grpc-port", grpc, "--metrics-port", metrics)
        self.serving = Serving(self.model.parent, self._environment, *arguments)
        self.serving.wait_until_served()
        addresses = [self.serving.address(name) for name in ("http", "grpc", "metrics")]
        self._ports = tuple(a.removesuffix("/metrics").rpartition(":")[2] for a in addresses)

    def stop(self) -> None:
        assert self.serving is not None
        self.serving.__exit__()

    @property
    def url(self) -> str:
        assert self.serving is not None
        return self.serving.address("grpc")

    def rollout(self, *arguments: str) -> subprocess.Popen[str]:
        return rollout_process(self.model, *arguments, "--url", self.url)

    def live_versions(self) -> list[set[str]]:
        """Ready versions of both front ends on the server, if it says them."""
        client = tritonclient.grpc.InferenceServerClient(self.url.removeprefix("grpc://"))
        try:
            models = client.get_model_repository_index().models
        except InferenceServerException:  # a file vanished while Triton listed the repository
            return []
        return [
            {m.version for m in models if m.name == front_end_name(NAME, modality) and m.state == "READY"}
            for modality in Modality
        ]

    def require_whole(self) -> int:
        """Check that files, manifest and server agree on one version, and return it."""
        repository = self.model.parent
        manifest = Manifest.read(self.model)
        manifest.verify(repository, manifest.variants[manifest.front_ends[0].variant])
        manifest.verify_front_ends(repository)
        served = {served_version(repository / front_end_name(NAME, modality)) for modality in Modality}
        assert len(served) == 1
        (version,) = served
        assert f"{NAME}_text/{version}/model.py" in {r.path for r in manifest.front_ends[0].files}
        wait_until(
            lambda: self.live_versions() == [{str(version)}] * 2,
            f"the server serves version {version}",
        )
        for kept in manifest.kept:
            release_from_version(self.model, kept.version).verify()
        assert not list(repository.glob("*_candidate_*"))
        # `serve` may be about to leave the stage in which it told the server of the change.
        wait_until(lambda: not list(repository.parent.glob(".*.staging-*")), "no stage is left")
        assert not list(repository.rglob("*.part"))
        return version


@pytest.fixture
def served(exported: Exported, server_environment: ServerEnvironment, tmp_path: Path):
    model = copied(exported(NAME), tmp_path / "served" / "models")
    new = copied(exported(NAME), tmp_path / "new")
    served = Served(model, new, server_environment)
    served.start()
    yield served
    served.stop()


def test_rollouts_killed_at_random_moments(served: Served) -> None:
    chance = random.Random(15)
    probes = Probes.read(served.model)
    began = time.monotonic()
    first = served.rollout("--to", str(served.new))
    assert first.wait(120) == 0, first.communicate()
    duration = time.monotonic() - began
    assert served.require_whole() == 2
    patient = Connection(retry_for_s=120)
    with Traffic(f"{served.url}/{NAME}", probes, patient, pause_s=0.02) as traffic:
        for i, how in zip(range(N_KILLS), itertools.cycle(SIGNALS)):
            arguments = ("--undo",) if i % 4 == 3 else ("--to", str(served.new))
            before = served_version(served.model.parent / f"{NAME}_text")
            process = served.rollout(*arguments)
            time.sleep(chance.uniform(0.3, 1.1) * duration)
            process.send_signal(how)
            said, _ = process.communicate(timeout=120)
            assert process.returncode in (0, -how, 128 + how, 1), said
            assert "Traceback" not in said
            if i % 3 == 2:  # a restart, before anything is put in order
                served.stop()
                served.start()
            # What was killed is put in order by serve itself.
            wait_until(
                lambda: (
                    all(journal.done for journal in journals_of_repository(served.model.parent))
                    and not (served.model.parent / LOCK_FILE).exists()
                ),
                "the journal is carried out",
            )
            version = served.require_whole()
            assert process.returncode != 0 or version != before or "is undone already" in said
    assert traffic.errors == []
    assert traffic.n_rounds > 10 * N_KILLS / 3
    # The way back is always there.
    if any(journal.outcome.value == "undone" for journal in journals_of_repository(served.model.parent)):
        undo = served.rollout("--undo")
        assert "is undone already" in undo.communicate(timeout=120)[0]
        assert undo.returncode == 0
    version, kept = served.require_whole(), Manifest.read(served.model).kept
    undo = served.rollout("--undo")
    assert undo.wait(120) == 0, undo.communicate()
    assert served.require_whole() == kept[-1].version != version


def test_a_second_rollout_is_refused_and_says_who_holds_the_repository(served: Served) -> None:
    with repository_lock(served.model.parent, "export"):
        second = served.rollout("--to", str(served.new))
        said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"is in use by `babeltower export`, process {os.getpid()} on " in said
    assert served.require_whole() == 1


def test_two_rollouts_at_once_leave_one_whole_version(served: Served) -> None:
    both = [served.rollout("--to", str(served.new)) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    n_done = sum(process.returncode == 0 for process in both)
    assert n_done >= 1
    for process, said in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "is in use by `babeltower rollout`" in said
    assert served.require_whole() == 1 + n_done


def test_control_is_for_this_machine_only(exported: Exported, server_environment: ServerEnvironment) -> None:
    model = exported(NAME)
    with Serving(model.parent, server_environment, "--control", "--host", "0.0.0.0", "--insecure") as serving:
        assert serving.process.wait(60) == 1
    assert any("--control lets every client" in line for line in serving.lines)


def test_a_rollout_says_which_server_it_needs(
    served: Served, exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """Before a version is staged, and once."""
    other = copied(exported("capivara"), tmp_path / "other")
    arguments = ("--to", str(served.new), "--url", served.url)
    said, _ = (process := rollout_process(other, *arguments)).communicate(timeout=120)
    assert process.returncode == 1
    assert "does not serve capivara: it has no capivara_image or capivara_text" in " ".join(said.split())
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    with Serving(served.model.parent, server_environment, *ports) as plain:
        plain.wait_until_served()
        arguments = ("--to", str(served.new), "--url", plain.address("grpc"))
        said, _ = (process := rollout_process(served.model, *arguments)).communicate(timeout=120)
    assert process.returncode == 1
    assert "does not let clients load models" in " ".join(said.split())
    assert said.count("--control") == 1
    assert "rolling back" not in said
    assert served.require_whole() == 1


def test_a_rollout_waits_for_serve(served: Served) -> None:
    """It holds the lock while it ends what a failed rollout left."""
    with repository_lock(served.model.parent, "serve"):
        second = served.rollout("--to", str(served.new))
        time.sleep(2.0)
        assert second.poll() is None
    assert second.wait(120) == 0
    assert served.require_whole() == 2
