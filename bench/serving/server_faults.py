"""Kill and stop a served repository's processes; measure how soon it is noticed, and how soon mended.

    python -m bench.serving.server_faults REPOSITORY/NAME --json bench/results/server_faults.json

`babeltower serve` runs under the traffic of our client and of a raw client. Each of its processes (a text
front end, an image front end, the towers, the server) is killed (SIGKILL) and stopped (SIGSTOP) in turn.
Measured from the signal on: until `/v2/health/ready` fails, until the probes of `babeltower ready` fail, and
until both pass again and our client's vectors arrive. Every vector is compared with the in-process
runtime's.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import typer

from bench.records.environment import environment
from bench.timing.background import Background
from bench.timing.serve_process import ServeProcess, wait_until
from bench.timing.soak_requests import Request, requests_of_soak
from runtime.encoder import Encoder
from runtime.manifest import Manifest
from runtime.remote import Connection
from runtime.server import default_folder, environment_from_folder
from runtime.server.readiness import HttpEndpoint, faults_of_server, probes_of_repository, stubs_of_server

__all__ = ["Fault", "FaultRecord", "Polled", "Traffic"]

_KIND = "babeltower-faults/1"
_MOST_UNREADY_S, _MOST_BACK_S = 5.0, 30.0
"""Limits on the time until readiness is false, and until the service is back."""
_TOLERANCE = 1e-6
_POLL_S, _POLL_TIMEOUT_S = 0.1, 2.0
_SETTLED_S = 12.0
"""Time between two faults, after which a restart is not delayed by the former one."""
_PATIENCE_S = 120.0
_FREE_PORTS = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")


@dataclass(slots=True)
class Fault:
    """What one signal did.

    Attributes:
        victim: Process that got the signal.
        health_false_s: Seconds until ``/v2/health/ready`` was not 200.
        probes_false_s: Seconds until the probes of ``babeltower ready`` failed.
        back_s: Seconds until both passed again and our client had new vectors of texts and images.
    """

    victim: str
    signal: str
    health_false_s: float
    probes_false_s: float
    back_s: float

    @property
    def is_in_time(self) -> bool:
        """Whether it was noticed and mended within the limits."""
        return (
            max(self.health_false_s, self.probes_false_s) <= _MOST_UNREADY_S and self.back_s <= _MOST_BACK_S
        )


@dataclass(slots=True)
class FaultRecord:
    """Faults of a run, and what clients saw meanwhile.

    Attributes:
        n_vectors: Vectors that clients received.
        n_wrong: Those that differ from the in-process runtime's by more than 1e-6.
        lost: Errors of our client, which repeats its requests.
        raw: Answers to raw gRPC clients, by status.
    """

    faults: list[Fault] = field(default_factory=list)
    n_vectors: int = 0
    n_wrong: int = 0
    lost: list[str] = field(default_factory=list)
    raw: dict[str, int] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether all faults were in time, no vector was wrong and our client lost nothing."""
        return (
            all(fault.is_in_time for fault in self.faults)
            and self.n_vectors > 0
            and not self.n_wrong
            and not self.lost
        )


class Polled(Background):
    """A condition looked at again and again on a thread, with the times at which it changed."""

    def __init__(self, holds: Callable[[], bool], every_s: float = _POLL_S) -> None:
        super().__init__(self._look)
        self._holds, self._every_s = holds, every_s
        self._looks: list[tuple[float, float, bool]] = []

    def _look(self) -> None:
        while not self.is_over.wait(self._every_s):
            began = time.monotonic()
            holds = self._holds()
            self._looks.append((began, time.monotonic(), holds))

    def false_since(self, time_s: float) -> float:
        """Wait for a look that ended since a time and found it false; return when it ended."""
        return self._end(lambda _, end, holds: end >= time_s and not holds)

    def true_since(self, time_s: float) -> float:
        """Wait for a look that began since a time and found it true; return when it ended."""
        return self._end(lambda began, _, holds: began >= time_s and holds)

    def _end(self, fits: Callable[[float, float, bool], bool]) -> float:
        def ends() -> list[float]:
            return [look[1] for look in list(self._looks) if fits(*look)][:1]

        wait_until(ends, "readiness changes", _PATIENCE_S)
        return ends()[0]


class Traffic(Background):
    """Texts and images embedded without a pause, by our client and raw ones; every vector is compared."""

    def __init__(self, grpc: str, name: str, requests: Sequence[Request], record: FaultRecord) -> None:
        super().__init__(self._ours, self._theirs)
        self._grpc, self._name, self._record = grpc, name, record
        self._requests = [request for request in requests if request.expected is not None]
        self._counting = threading.Lock()
        self._rounds: list[tuple[float, float]] = []
        self._raw: collections.Counter[str] = collections.Counter()

    def __exit__(self, *_: object) -> None:
        """End, and write what was seen to the record."""
        super().__exit__()
        self._record.raw = dict(self._raw)

    def answered_since(self, time_s: float) -> float:
        """Wait for a round of our client begun since a time; return when it ended."""

        def found() -> list[float]:
            return [end for began, end in list(self._rounds) if began >= time_s][:1]

        wait_until(found, "our client is answered", _PATIENCE_S)
        return found()[0]

    def _ours(self) -> None:
        texts = [r for r in self._requests if "text" in r.inputs][:8]
        images = [r for r in self._requests if "image" in r.inputs][:2]
        given = [r.inputs["text"].item().decode() for r in texts]
        languages = [r.inputs["language"].item().decode() for r in texts]
        files = [r.inputs["image"].item() for r in images]
        with Encoder.open(
            f"{self._grpc}/{self._name}", connection=Connection(retry_for_s=_PATIENCE_S)
        ) as encoder:
            while not self.is_over.is_set():
                began = time.monotonic()
                try:
                    found = [*encoder.embed_texts(given, languages), *encoder.embed_images(files)]
                except Exception as error:
                    self._record.lost.append(str(error))
                else:
                    self._compare(found, [*texts, *images])
                    self._rounds.append((began, time.monotonic()))

    def _theirs(self) -> None:
        from tritonclient.grpc import InferenceServerClient, InferInput
        from tritonclient.utils import InferenceServerException

        client = InferenceServerClient(self._grpc.removeprefix("grpc://"))
        while not self.is_over.is_set():
            for request in self._requests:
                if self.is_over.is_set():
                    break
                tensors = []
                for column, array in request.inputs.items():
                    tensors.append(InferInput(column, list(array.shape), "BYTES"))
                    tensors[-1].set_data_from_numpy(array)
                try:
                    vector = client.infer(request.model, tensors, client_timeout=5).as_numpy("vector")[0]
                except InferenceServerException as error:
                    self._raw[str(error.status())] += 1
                    self.is_over.wait(0.02)
                else:
                    self._raw["answered"] += 1
                    self._compare([vector], [request])

    def _compare(self, found: Sequence[Any], requests: Sequence[Request]) -> None:
        wrong = sum(
            not bool(np.abs(vector - request.expected).max() <= _TOLERANCE)
            for vector, request in zip(found, requests, strict=True)
        )
        with self._counting:
            self._record.n_vectors += len(requests)
            self._record.n_wrong += wrong


def _victims(model: Path) -> dict[str, str]:
    """Return the instance of each kind of process, by what it is; the server has none."""
    manifest = Manifest.read(model)
    variant = manifest.variants[manifest.front_ends[0].variant]
    return {
        "text front end": f"{model.name}_text_0_0",
        "image front end": f"{model.name}_image_0_0",
        "text tower": f"{variant.text.model}_0_0",
        "image tower": f"{variant.image.model}_0_0",
        "server": "",
    }


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        contextlib.suppress(OSError),
        opener.open(f"{url}/v2/health/ready", timeout=_POLL_TIMEOUT_S) as answer,
    ):
        return bool(answer.status == 200)
    return False


def _faults(
    serving: ServeProcess, model: Path, traffic: Traffic, rounds: int, settled_s: float
) -> Iterator[Fault]:
    url = serving.address("http")
    probes = probes_of_repository(model.parent)
    with (
        Polled(lambda: _is_healthy(url)) as health,
        Polled(lambda: not faults_of_server(HttpEndpoint(url), probes)) as probed,
    ):
        for _ in range(rounds):
            for victim, instance in _victims(model).items():
                for how in (signal.SIGKILL, signal.SIGSTOP):
                    time.sleep(settled_s)
                    server = serving.server_pid
                    pid = server
                    if instance:
                        (pid,) = [stub.pid for stub in stubs_of_server(server) if stub.instance == instance]
                    began = time.monotonic()
                    os.kill(pid, how)
                    lost = [poll.false_since(began) for poll in (health, probed)]
                    ready = [poll.true_since(max(lost)) for poll in (health, probed)]
                    back = max(*ready, traffic.answered_since(max(lost)))
                    yield Fault(victim, how.name, *(round(t - began, 3) for t in (*lost, back)))


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each process gets each signal.")] = 3,
    settled_s: Annotated[float, typer.Option(min=0, help="Seconds between two signals.")] = _SETTLED_S,
    record: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure how a served repository survives faults; exit code 0 if all are noticed and mended in time."""
    manifest = Manifest.read(model)
    requests = requests_of_soak(model, 400)
    found = FaultRecord()
    with ServeProcess(
        model.parent, environment_from_folder(env or default_folder()), *_FREE_PORTS
    ) as serving:
        serving.wait_until_served()
        with Traffic(serving.address("grpc"), model.name, requests, found) as traffic:
            traffic.answered_since(time.monotonic())
            for fault in _faults(serving, model, traffic, rounds, settled_s):
                found.faults.append(fault)
                typer.echo(
                    f"{fault.signal} {fault.victim}: health false after {fault.health_false_s:.1f} s, probes "
                    f"after {fault.probes_false_s:.1f} s, back after {fault.back_s:.1f} s"
                )
    typer.echo(
        f"{len(found.faults)} faults; {found.n_wrong} of {found.n_vectors} vectors wrong; "
        f"{len(found.lost)} requests lost; raw clients saw {found.raw}"
    )
    if record is not None:
        _write_record(found, record, model=model.name, variant=manifest.front_ends[0].variant)
    raise typer.Exit(int(not found.is_good))


def _write_record(found: FaultRecord, path: Path, **facts: Any) -> None:
    data = {"schema": _KIND, "environment": asdict(environment()), **facts, **asdict(found)}
    faults = ",\n  ".join(json.dumps(fault) for fault in data.pop("faults"))
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    lines.append(f' "faults": [\n  {faults}\n ]')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
