"""Supervision of a server: restarted, with growing delays, when it or one of its Python models is dead."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from runtime.errors import BabeltowerError, EngineError
from runtime.logs import LOGGER
from runtime.manifest import Modality, front_end_name
from runtime.remote.options import UNIX
from runtime.server.environment import ServerEnvironment
from runtime.server.process import Server, ServerOptions, running_server
from runtime.server.readiness import (
    FrontEndProbe,
    HttpEndpoint,
    faults_of_processes,
    probes_of_repository,
    results_of_probes,
    too_long_busy,
)
from runtime.server.recovery import recover_before_start

__all__ = ["Health", "Watch", "restart_delays_s", "supervised"]

Say: TypeAlias = Callable[[str], None]

_LOOK_S = 0.5
"""Seconds between two looks at the processes."""
_LASTING_S = 10.0
"""Time after which a start counts as a success."""
_MOST_FAILED, _MOST_SHORT = 6, 20
"""Starts in a row that fail, or do not last, until the supervision ends."""
_LONGEST_DELAY_S = 8.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Patience of the supervision.

    Attributes:
        probe_every_s: Seconds between two rounds of probes.
        failed_probes: Failed probes of one model in a row after which the server is restarted.
    """

    probe_every_s: float = 2.0
    failed_probes: int = 3


@dataclass(slots=True)
class Health:
    """What is wrong with a supervised server now, in words; empty if nothing is.

    The supervision writes it from its threads; whoever answers for the server's readiness reads it.
    """

    faults: tuple[str, ...] = ()

    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def restart_delays_s() -> Iterator[float]:
    """Yield endless delays before restarts in seconds: none, 1, doubled up to 8."""
    yield 0.0
    delay = 1.0
    while True:
        yield delay
        delay = min(2 * delay, _LONGEST_DELAY_S)


def supervised(
    repository: Path,
    *,
    environment: ServerEnvironment,
    options: Callable[[], ServerOptions],
    stop: threading.Event,
    started: Callable[[Server], None],
    say: Say,
    each_look: Callable[[Server], None] = lambda _: None,
    watch: Watch | None = None,
    health: Health | None = None,
) -> None:
    """Keep a server of a repository running until ``stop`` is set; then answer what runs, and end it.

    What a killed command left in the repository is finished or undone before each start.

    Args:
        options: Options of the next start, which may differ from those of the last: models come and go. Ports
            that were picked stay.
        started: Called when the server is ready, after each start.
        each_look: Called twice a second while it runs.
        health: Is kept true: bad from the first failed probe on, and until the server is started again.

    Raises:
        BabeltowerError: the first start fails, as of ``running_server``, and not because it was stopped.
        EngineError: too many starts in a row failed.
    """
    delays, n_short, n_failed = restart_delays_s(), 0, 0
    first: Server | None = None
    health = health or Health()
    while not stop.is_set():
        recover_before_start(repository, say)
        chosen = options() if first is None else _at_ports(first, options())
        began = float("inf")
        try:
            with running_server(
                repository, environment=environment, options=chosen, stop=stop, say=say
            ) as server:
                began = time.monotonic()
                server.note_regions()
                started(server)
                first = first or server
                health.faults = ()
                fault = _fault(server, repository, stop, each_look, watch or Watch(), health)
                if fault:
                    health.faults = (fault,)
                    server.kill()
        except (BabeltowerError, OSError) as error:
            if first is None and not stop.is_set():
                raise
            fault = str(error)
        if stop.is_set():
            return
        health.faults = (fault,)
        n_failed = n_failed + 1 if began == float("inf") else 0
        n_short += 1
        if time.monotonic() - began > _LASTING_S:
            delays, n_short = restart_delays_s(), 0
        if n_failed >= _MOST_FAILED or n_short >= _MOST_SHORT:
            raise EngineError(f"The server was started {n_short} times in a row and did not last. {fault}")
        delay = next(delays)
        say(f"{fault}; the server is started again" + (f" in {delay:.0f} s" if delay else ""))
        stop.wait(delay)


def _at_ports(server: Server, options: ServerOptions) -> ServerOptions:
    """Return options with the ports that a former server had."""
    http, grpc, metrics = (
        0 if address.startswith(UNIX) else int(address.rpartition(":")[2])
        for address in (server.addresses.http, server.addresses.grpc, server.addresses.metrics)
    )
    return dataclasses.replace(options, http_port=http, grpc_port=grpc, metrics_port=metrics)


def _fault(
    server: Server,
    repository: Path,
    stop: threading.Event,
    each_look: Callable[[Server], None],
    watch: Watch,
    health: Health,
) -> str:
    """Return what is wrong with a server, in words, once it is; empty if it is to be stopped."""
    with contextlib.closing(_Prober(server, repository, watch, health)) as prober:
        return _fault_of_looks(server, prober, stop, each_look)


def _fault_of_looks(
    server: Server, prober: _Prober, stop: threading.Event, each_look: Callable[[Server], None]
) -> str:
    last: list[str] = []
    while not stop.wait(_LOOK_S):
        if server.process.poll() is not None:
            return f"The server exited with code {server.process.returncode}"
        seen = faults_of_processes(server.pid)
        # A model that is being unloaded is a zombie for an instant.
        if lasting := [fault for fault in seen if fault in last]:
            return "; ".join(lasting)
        last = seen
        if fault := prober.fault():
            return fault
        each_look(server)
    return ""


class _Prober:
    """Rounds of probes on a thread of their own, since a dead server lets them wait."""

    def __init__(self, server: Server, repository: Path, watch: Watch, health: Health) -> None:
        self._endpoint = HttpEndpoint(server.addresses.http_url, server.security.headers())
        self._left_out = {front_end_name(name, modality) for name in server.left_out for modality in Modality}
        self._repository = repository
        self._watch = watch
        self._health = health
        self._is_closed = False
        self._writing = threading.Lock()
        self._server = server
        self._n_failed: Counter[str] = Counter()
        self._busy_since: dict[str, float] = {}
        self._next = time.monotonic() + watch.probe_every_s
        self._round: threading.Thread | None = None

    def fault(self) -> str:
        """Start a round if it is time; return the faults if a model failed in enough rounds in a row."""
        if self._round is not None and self._round.is_alive():
            return ""
        if max(self._n_failed.values(), default=0) >= self._watch.failed_probes:
            return "; ".join(self._health.faults)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._watch.probe_every_s
            self._round = threading.Thread(target=self._ask, name="babeltower-readiness", daemon=True)
            self._round.start()
        return ""

    def _ask(self) -> None:
        try:
            self._server.note_regions()
            results = results_of_probes(self._endpoint, self._probes(), server=self._server.pid)
            faults = [found.fault for found in results if found.fault]
            failed = {found.model: self._n_failed[found.model] + 1 for found in results if found.fault}
            if hung := too_long_busy(results, self._busy_since):
                faults += hung
                failed[""] = self._watch.failed_probes
        except Exception as error:  # one that ends the thread would be seen by nobody
            LOGGER.error("a round of probes failed", exc_info=error)
            faults = [f"the server cannot be probed: {type(error).__name__}: {error}"]
            failed = {"": self._n_failed[""] + 1}
        self._n_failed = Counter(failed)
        with self._writing:
            if not self._is_closed:
                self._health.faults = tuple(faults)

    def close(self) -> None:
        """Write no health any more: it is that of the next server."""
        with self._writing:
            self._is_closed = True

    def _probes(self) -> list[FrontEndProbe]:
        """Read the probes anew, since a model may have come; none while files are being replaced."""
        try:
            probes = probes_of_repository(self._repository)
            return [probe for probe in probes if probe.model not in self._left_out]
        except ValueError:
            return []
