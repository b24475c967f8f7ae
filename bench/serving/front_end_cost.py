"""Measure what the text front end costs beside constant models that take the same requests.

    python -m bench.serving.front_end_cost REPOSITORY/NAME --before 6bb3472 --json FILE

One server has the front end, one with the code of another revision, both again without splitting batches by
length, a model that answers with constant vectors, and one that also calls the tower once a batch. The same
clients, which each send one text and wait, take turns with them. The difference to the last is a front end's
own cost; the rest is that of any Python model. CPU time is compared, since the machine's cores are shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import typer
from numpy.typing import NDArray

from bench.records.turns import write_turns
from export.tuning.inputs import languages_for, realistic_texts
from export.tuning.load_generator import load_of_server, text_requests
from export.tuning.operation import TunedFiles, tuned_files
from export.tuning.trial_server import linked_folder
from runtime.errors import BabeltowerError
from runtime.manifest import FRONT_END_FILE, Manifest, Modality, TextPreprocessing
from runtime.server import Server, ServerOptions, default_folder, environment_from_folder, running_server
from runtime.server.readiness import stubs_of_server
from runtime.triton_config import config_of_folder, write_config

__all__ = [
    "BEFORE",
    "CONSTANT",
    "FRONT_END",
    "ONE_CALL",
    "ONE_CALL_BEFORE",
    "WITH_TOWER",
    "FrontEndCost",
    "FrontEndTurn",
    "cpu_us_of_processes",
]

_KIND = "babeltower-front-end-cost/1"
_SOURCE = Path(__file__).resolve().parents[2]

FRONT_END, ONE_CALL = "front end", "front end, one call of the tower"
BEFORE, ONE_CALL_BEFORE = "front end before", "front end before, one call of the tower"
_FRONT_ENDS = (FRONT_END, ONE_CALL, BEFORE, ONE_CALL_BEFORE)
_NO_SPLIT = {"babeltower_bucket_overhead": "100000"}
"""Overhead of a call, in tokens, that no split of a batch by length is worth."""

CONSTANT, WITH_TOWER = "constant vectors", "constant vectors, one call of the tower"


@dataclass(frozen=True, slots=True)
class FrontEndTurn:
    """Texts that a model answered in a turn, and the CPU µs of each in every process.

    Attributes:
        n_batches: Executions of the model; ``n_calls`` are those of the tower.
        front_us: CPU time a text of the model's own processes, and so on.
    """

    n_texts: int
    seconds: float
    n_batches: int
    n_calls: int
    front_us: float
    server_us: float
    tower_us: float
    client_us: float

    @property
    def rate(self) -> float:
        """Texts per second, on cores that the clients share."""
        return self.n_texts / self.seconds

    @property
    def all_us(self) -> float:
        """CPU time a text of the server's processes together."""
        return self.front_us + self.server_us + self.tower_us


@dataclass(slots=True)
class FrontEndCost:
    """Turns of every model, in order; ``max_difference`` is that of vectors of both revisions."""

    turns: dict[str, list[FrontEndTurn]] = field(default_factory=dict)
    max_difference: float | None = None

    def median(self, model: str, figure: str) -> float:
        """Median over turns."""
        return statistics.median(float(getattr(turn, figure)) for turn in self.turns[model])

    def own_us(self, model: str) -> float:
        """Median over rounds of a front end's CPU time a text beyond that of constants and a call."""
        pairs = zip(self.turns[model], self.turns[WITH_TOWER], strict=True)
        return statistics.median(turn.front_us - constant.front_us for turn, constant in pairs)

    def __str__(self) -> str:
        lines = []
        for model, turns in self.turns.items():
            n_texts, n_batches, n_calls = (
                sum(getattr(turn, name) for turn in turns) for name in ("n_texts", "n_batches", "n_calls")
            )
            own = f", {self.own_us(model):.0f} its own" if model in _FRONT_ENDS else ""
            lines.append(
                f"{model}: {self.median(model, 'rate'):.0f} texts/s, {n_texts / n_batches:.1f} a batch, "
                f"{n_calls / n_batches:.1f} calls a batch; CPU µs a text: front end "
                f"{self.median(model, 'front_us'):.0f}{own}, server {self.median(model, 'server_us'):.0f}, "
                f"tower {self.median(model, 'tower_us'):.0f}, client {self.median(model, 'client_us'):.0f}"
            )
        if self.max_difference is not None:
            lines.append(f"largest difference of vectors before and after: {self.max_difference:.1e}")
        return "\n".join(lines)


def cpu_us_of_processes(pids: Iterable[int]) -> float:
    """Return the CPU time of running processes in µs, with that of their ended threads."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime_ns((~pid << 3) | 2)  # the clock of clock_getcpuclockid(3)
    return float(total) / 1e3


def _stage(stage: Path, model: Path, files: TunedFiles, before: str | None) -> dict[str, str]:
    """Write the repository of the comparison; return the Triton model of each way."""
    repository, front = model.parent, files.front
    linked_folder(repository / files.tower, stage / files.tower)
    linked_folder(repository / front, stage / front)
    found = {
        CONSTANT: _constant(stage, repository / front, "constant", {}),
        WITH_TOWER: _constant(
            stage,
            repository / front,
            "constant_tower",
            {"tower": files.tower, "tower_inputs": " ".join(Manifest.read(model).text.graph_inputs)},
        ),
    }
    if before is not None:
        found[BEFORE] = _of_revision(stage / "before", repository / front, before, {})
        found[ONE_CALL_BEFORE] = _of_revision(stage / "before_one", repository / front, before, _NO_SPLIT)
    linked_folder(repository / front, stage / "one_call")
    _write_config(repository / front, stage / "one_call", _NO_SPLIT)
    return {**found, FRONT_END: front, ONE_CALL: "one_call"}


def _constant(stage: Path, front: Path, name: str, parameters: Mapping[str, str]) -> str:
    version = stage / name / "1"
    version.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("constant_model.py"), version / "model.py")
    _write_config(front, stage / name, parameters)
    return name


def _of_revision(target: Path, front: Path, revision: str, parameters: Mapping[str, str]) -> str:
    """Copy a front end with the code of another revision."""
    version = target / "1"
    version.mkdir(parents=True)
    for path in (front / "1").iterdir():
        if path.is_file() and path.suffix != ".py":
            shutil.copyfile(path, version / path.name)
    archive = subprocess.run(
        ["git", "archive", revision, "runtime", "triton_models"],
        cwd=_SOURCE,
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        raise BabeltowerError(
            f"Revision {revision!r} cannot be read: {archive.stderr.decode().strip()}. Run the benchmark in "
            "a whole clone, or leave out --before."
        )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(version, filter="data")
    shutil.copyfile(version / "triton_models" / "text" / "model.py", version / "model.py")
    _leave_out_defaults(version / FRONT_END_FILE)
    _write_config(front, target, parameters)
    return target.name


def _leave_out_defaults(path: Path) -> None:
    """Remove what an older revision may not know, and what is its only way of working."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    for known in dataclasses.fields(TextPreprocessing):
        given = spec["preprocessing"].get(known.name)
        if given == known.default or (given == [] and known.default == ()):
            del spec["preprocessing"][known.name]
    path.write_text(json.dumps(spec), encoding="utf-8")


def _write_config(front: Path, target: Path, parameters: Mapping[str, str]) -> None:
    config = config_of_folder(front)
    config.name = target.name
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    write_config(target, config)


@dataclass(frozen=True, slots=True)
class _Load:
    """Load that is put on each model of a server in turn."""

    server: Server
    tower: str
    requests: Mapping[str, Sequence[bytes]]
    models: Mapping[str, str]
    clients: int

    def vectors(self, way: str) -> Mapping[int, NDArray[np.float32]]:
        """Send every request once."""
        address = self.server.addresses.grpc
        return load_of_server(address, self.requests[way], clients=self.clients).vectors

    def turn(self, way: str, turn_s: float) -> FrontEndTurn:
        """Measure one model for a time."""
        model = self.models[way]
        stubs = stubs_of_server(self.server.pid)
        groups = {
            "front": [stub.pid for stub in stubs if _is_instance(stub.instance, model)],
            "tower": [stub.pid for stub in stubs if _is_instance(stub.instance, self.tower)],
            "server": [self.server.pid],
            "client": [os.getpid()],
        }
        counts = self._counts(model)
        before = {name: cpu_us_of_processes(pids) for name, pids in groups.items()}
        started = time.perf_counter()
        load = load_of_server(
            self.server.addresses.grpc, self.requests[way], clients=self.clients, seconds=turn_s
        )
        seconds = time.perf_counter() - started
        spent = {name: cpu_us_of_processes(pids) - before[name] for name, pids in groups.items()}
        if load.failures:
            raise BabeltowerError(f"{model} failed under load: {next(iter(load.failures))}")
        n_texts, n_batches, n_calls = (
            now - then for now, then in zip(self._counts(model), counts, strict=True)
        )
        a_text = {f"{name}_us": round(us / n_texts, 2) for name, us in spent.items()}
        return FrontEndTurn(n_texts, round(seconds, 3), n_batches, n_calls, **a_text)

    def _counts(self, model: str) -> tuple[int, int, int]:
        import tritonclient.grpc

        with tritonclient.grpc.InferenceServerClient(self.server.addresses.grpc) as client:
            front = client.get_inference_statistics(model).model_stats[0]
            tower = client.get_inference_statistics(self.tower).model_stats[0]
        return front.inference_count, front.execution_count, tower.execution_count


def _is_instance(instance: str, model: str) -> bool:
    """Check whether a process is one of a model's instances, ``MODEL_0_1``."""
    rest = instance.removeprefix(f"{model}_")
    return rest != instance and rest.replace("_", "").isdecimal()


def measure(
    model: Path,
    server_environment: Path,
    *,
    before: str | None,
    clients: int,
    n_texts: int,
    rounds: int,
    turn_s: float,
) -> FrontEndCost:
    """Measure all models on one server, in turns that change their order every round."""
    manifest = Manifest.read(model)
    files = tuned_files(model, manifest, Modality.TEXT)
    texts, codes = realistic_texts(n_texts)
    languages = languages_for(manifest, codes)
    with tempfile.TemporaryDirectory(dir=model.parent.parent) as folder:
        stage = Path(folder)
        models = _stage(stage, model, files, before)
        requests = {way: text_requests(name, texts, languages) for way, name in models.items()}
        options = ServerOptions(models=(files.tower, *models.values()))
        with running_server(
            stage, environment=environment_from_folder(server_environment), options=options
        ) as server:
            load = _Load(server, files.tower, requests, models, clients)
            vectors = {way: load.vectors(way) for way in models}  # warms up
            found = FrontEndCost({way: [] for way in models})
            if before is not None:
                found.max_difference = max(
                    float(np.abs(vector - vectors[BEFORE][i]).max())
                    for i, vector in vectors[FRONT_END].items()
                )
            for i in range(rounds):
                for way in list(models) if i % 2 == 0 else reversed(models):
                    found.turns[way].append(load.turn(way, turn_s))
            return found


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    before: Annotated[str | None, typer.Option(help="Revision whose front end is compared.")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 32,
    n_texts: Annotated[int, typer.Option(min=64)] = 2_000,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 12,
    turn_s: Annotated[float, typer.Option(min=0.1)] = 3.0,
    record: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compare the CPU time of a text in the front end and in models that answer with constants."""
    found = measure(
        model,
        env or default_folder(),
        before=before,
        clients=clients,
        n_texts=n_texts,
        rounds=rounds,
        turn_s=turn_s,
    )
    typer.echo(str(found))
    if record is not None:
        variant = Manifest.read(model).front_ends[0].variant
        facts = {
            "model": model.name,
            "variant": variant,
            "clients": clients,
            "before": before,
            "own_us": {way: round(found.own_us(way), 2) for way in found.turns if way in _FRONT_ENDS},
            "max_difference": found.max_difference,
        }
        write_turns(record, _KIND, facts, found.turns)


if __name__ == "__main__":
    typer.run(main)
