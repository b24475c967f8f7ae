"""Timing of all peers in turns; no time counts before the vectors equal the reference's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.peers.environments import pins_of, python_of
from bench.peers.models import N_TOKENS, GivenModel, PeerCase
from bench.peers.process import PeerError, PeerProcess
from bench.peers.registry import Peer, Stage
from bench.records.record import Record, record_of, suite_cell
from export.parity.limits import limits_of
from runtime.cosines import row_cosines, worst_rows
from runtime.errors import BabeltowerError
from runtime.manifest import Engine, Modality

__all__ = ["Processes", "cell_of", "measure_case", "require_equal"]

_SECONDS = 0.04
_VERSIONS = ("torch", "transformers", "open_clip_torch", "onnxruntime", "openvino", "nncf")

Say = Callable[[str], None]


@dataclass
class Processes:
    """Processes of the peers, each started at its first model, and the models that failed to open."""

    environments: Path
    say: Say
    _running: dict[str, PeerProcess] = field(default_factory=dict)
    _errors: dict[tuple[str, str], str] = field(default_factory=dict)
    _opened: set[tuple[str, str]] = field(default_factory=set)

    def open(self, peers: Sequence[Peer], model: GivenModel, modality: Modality) -> None:
        """Open a tower with all peers, two at a time; a failure is kept as that peer's error."""
        pythons = {peer.key: self._python(peer) for peer in peers}
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda peer: self._open(peer, pythons[peer.key], model, modality), peers))

    def error(self, peer: Peer, model: GivenModel, modality: Modality) -> str | None:
        """Return the reason that a peer could not open a tower, if any."""
        return self._errors.get((peer.key, _key(model, modality)))

    def process(self, peer: Peer) -> PeerProcess:
        """Return the process of a peer that has opened something."""
        return self._running[peer.key]

    def restart(self) -> None:
        """End all processes, which frees their memory."""
        for process in self._running.values():
            process.close()
        self._running.clear()
        self._opened.clear()

    def _python(self, peer: Peer) -> Path | str:
        if peer.environment is None:
            return Path(sys.executable)
        try:
            return python_of(peer.environment, self.environments, self.say)
        except BabeltowerError as error:
            return str(error)

    def _open(self, peer: Peer, python: Path | str, model: GivenModel, modality: Modality) -> None:
        key = _key(model, modality)
        try:
            if isinstance(python, str):
                raise PeerError(python)
            if peer.key not in self._running:
                self._running[peer.key] = PeerProcess(python, peer.loop, sees_project=peer.is_own)
            task = {
                **model.task(modality),
                **peer.options,
                "engine": peer.engine,
                "precision": peer.precision.value,
                "stage": peer.stage.value,
            }
            self._running[peer.key].open(key, task)
        except PeerError as error:
            self._errors[peer.key, key] = str(error)
            if peer.key in self._running and not self._running[peer.key].is_alive:
                self._running.pop(peer.key).close()


@contextlib.contextmanager
def processes(environments: Path, say: Say) -> Iterator[Processes]:
    """Yield processes that end with the block."""
    found = Processes(environments, say)
    try:
        yield found
    finally:
        found.restart()


def measure_case(
    peers: Sequence[Peer], running: Processes, model: GivenModel, case: PeerCase, *, turns: int
) -> list[Record]:
    """Compare each peer's vectors, then time the peers in turns; return a record or error of each."""
    key = _key(model, case.modality)
    errors: dict[str, str] = {}
    cosines: dict[str, float] = {}

    def compare(peer: Peer) -> None:
        error = running.error(peer, model, case.modality)
        try:
            if error is not None:
                raise PeerError(error)
            vectors = running.process(peer).vectors(key, case.inputs)
            cosines[peer.key] = require_equal(vectors, case.reference, peer)
        except (PeerError, KeyError) as found:
            errors[peer.key] = str(found)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compare, peers))
    timed = [peer for peer in peers if peer.key not in errors]
    samples, wall = _turns(timed, running, key, case.inputs, turns)
    return [
        record_of(
            cell_of(peer, model, case),
            samples.get(peer.key, []),
            unit="ms",
            settings=_settings(peer, turns, cosines.get(peer.key), wall.get(peer.key)),
            error=errors.get(peer.key),
        )
        for peer in peers
    ]


def require_equal(vectors: NDArray[np.float32], reference: NDArray[np.float32], peer: Peer) -> float:
    """Return the lowest cosine of any row to the reference's.

    Raises:
        PeerError: the cosine is below the limit of the peer's precision, which applies to this project's
            variants too; the peer computes something else, and its speed is not valid.
    """
    if vectors.shape != reference.shape:
        raise PeerError(f"gave vectors {list(vectors.shape)}; expected {list(reference.shape)}")
    cosines = row_cosines(vectors, reference)
    cosine = float(cosines.min())
    limit = limits_of(peer.precision, Engine.ONNXRUNTIME).min_cosine
    if not cosine >= limit:
        raise PeerError(
            f"computes something else than the reference: cosine {cosine:.6f}, expected at least {limit} "
            f"in {peer.precision.value}, at {worst_rows(cosines)}"
        )
    return cosine


def cell_of(peer: Peer, model: GivenModel, case: PeerCase) -> dict[str, str]:
    """Return the name of a cell; ``tokens`` is ``strings`` or ``files`` if the run starts from those."""
    text = case.modality is Modality.TEXT
    cell = suite_cell(
        suite="peers",
        metric="cpu",
        model=model.name,
        family=model.family,
        tower=case.modality.value,
        by=peer.name,
        engine=peer.engine,
        precision=peer.precision.value,
        batch=case.n_rows,
        tokens=N_TOKENS if text and case.stage is Stage.PREPARED else None,
    )
    return cell if case.stage is Stage.PREPARED else {**cell, "tokens": "strings" if text else "files"}


def _turns(
    peers: Sequence[Peer], running: Processes, key: str, inputs: Path, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return milliseconds per run, CPU and wall, of each peer; the first peer rotates every turn."""
    n_runs = {}
    for peer in peers:
        seconds, _ = running.process(peer).seconds(key, inputs, 2)
        n_runs[peer.key] = max(1, round(_SECONDS / max(seconds / 2, 1e-5)))
    cpu: dict[str, list[float]] = {peer.key: [] for peer in peers}
    wall: dict[str, list[float]] = {peer.key: [] for peer in peers}
    for turn in range(turns):
        begin = turn * max(1, len(peers) // turns) % max(1, len(peers))
        for peer in (*peers[begin:], *peers[:begin]):
            n = n_runs[peer.key]
            cpu_s, wall_s = running.process(peer).seconds(key, inputs, n)
            cpu[peer.key].append(1e3 * cpu_s / n)
            wall[peer.key].append(1e3 * wall_s / n)
    return cpu, wall


def _settings(
    peer: Peer, turns: int, cosine: float | None, wall: Sequence[float] | None
) -> Mapping[str, Any]:
    pins = {} if peer.environment is None else pins_of(peer.environment)
    own = {peer.environment, *_VERSIONS}
    return {
        "threads": 1,
        "turns": turns,
        "min_cosine": cosine,
        "environment": peer.environment or "the suite's own",
        "peer_versions": {name: version for name, version in pins.items() if name in own},
        "wall_ms": list(wall or ()),
    }


def _key(model: GivenModel, modality: Modality) -> str:
    return f"{model.name}/{modality.value}"
