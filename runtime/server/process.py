"""Start, readiness and stop of one ``tritonserver`` process and its children."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.draining import DRAIN_VARIABLE, drained, drained_processes
from runtime.errors import BabeltowerError, EngineError, ManifestError, OpeningCheckError
from runtime.logs import LOGGER
from runtime.manifest import manifest_path, names_in_repository
from runtime.remote.options import UNIX, is_loopback
from runtime.server.backends import write_backends
from runtime.server.checks import require_right_answers
from runtime.server.devices import require_no_gpu
from runtime.server.environment import ServerEnvironment
from runtime.server.log import RunLog, log_of_run
from runtime.server.loopback import opened
from runtime.server.readiness import stubs_of_server
from runtime.server.recovery import while_changed
from runtime.server.scratch import REGION, SHARED_MEMORY, note_regions, owner_descriptor, plain_folder
from runtime.server.security import Security
from runtime.server.served_models import ServedModels, linked_repository, served_models
from runtime.triton_config import CONFIG_FILE

__all__ = ["Addresses", "Server", "ServerOptions", "require_repository", "running_server"]

_DRAIN_S, _STOP_S = 25.0, 30.0
_EXIT_S = 8
"""Time that Triton has for running requests if it is told to stop and was not drained."""
_LAST_ANSWERS_S = 0.3
"""Time for the last answers to leave the server, once its models are drained."""
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
_MOST_CRASHES = 4
"""Triton 24.10 rarely crashes while it starts many Python models at once on a busy machine."""
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
"""Without these, glibc keeps the memory of large requests in each of up to eight arenas per core."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        host: Address to listen on; default: this machine only.
        metrics_host: Address for metrics; default: ``host``.
        sockets: Private folder of the Unix sockets behind a gateway; default: one of each start's own.
        http_port, grpc_port, metrics_port: Ports; 0 picks a free one.
        models: Load only these Triton models; if empty, the front ends and towers that the manifests name.
        explicit: Load only ``models``, even if empty, and allow clients to load others.
        leave_broken: Serve without the models that are damaged or do not load, if another one remains.
        security: Token, TLS, and what clients may do.
        ready_s: Timeout for loading.
        backends: Folder of Triton's own backends, used instead of ours; see ``write_backends``.
        log: File for the server's log; without one it is kept only while the server runs.
        verify: Verify file checksums before the start, and answers to the opening probes before the server is
            returned.
        arguments: Further arguments of ``tritonserver``.
    """

    host: str = "127.0.0.1"
    metrics_host: str | None = None
    sockets: Path | None = None
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    models: tuple[str, ...] = ()
    explicit: bool = False
    leave_broken: bool = False
    security: Security = field(default_factory=Security)
    ready_s: float = 300.0
    backends: Path | None = None
    log: Path | None = None
    verify: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def guards_grpc(self) -> bool:
        """Whether gRPC is behind the gateway: where it is guarded, and strangers may reach it."""
        return self.security.guarded and (self.security.is_closed or not is_loopback(self.host))


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of a server's endpoints: ``HOST:PORT``, or ``unix:PATH`` behind a gateway."""

    http: str
    grpc: str
    metrics: str

    @property
    def http_url(self) -> str:
        """URL of the HTTP endpoint, for ``opened``."""
        if self.http.startswith(UNIX):
            return f"unix://{quote(self.http.removeprefix(UNIX), safe='')}"
        return f"http://{self.http}"


@dataclass(frozen=True, slots=True)
class Server:
    """Running server process.

    Attributes:
        drain: Folder by which it is drained.
        security: What it asks of clients.
        log_start: Length of the log when it was started.
        left_out: Models that are damaged or did not load, and are not served.
    """

    addresses: Addresses
    process: subprocess.Popen[bytes]
    log: Path
    drain: Path
    security: Security = field(default_factory=Security)
    log_start: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def pid(self) -> int:
        """Process id of the server, which leads its own process group."""
        return self.process.pid

    def models(self) -> Sequence[Mapping[str, Any]]:
        """Return every model's name, version, state and reason, as reported by the server."""
        request = urllib.request.Request(
            f"{self.addresses.http_url}/v2/repository/index",
            data=b"{}",
            method="POST",
            headers=self.security.headers(),
        )
        n_left = 3
        while True:
            n_left -= 1
            try:
                with opened(request, timeout=10) as answer:
                    found: Sequence[Mapping[str, Any]] = json.load(answer)
                    return found
            except urllib.error.HTTPError:  # a file of the repository vanished while Triton listed it
                if not n_left:
                    raise
                time.sleep(0.2)

    def metrics(self) -> str:
        """Return the metrics page, in Prometheus format."""
        with opened(f"http://{self.addresses.metrics}/metrics", timeout=10) as answer:
            page: str = answer.read().decode()
        return page

    def is_ready(self) -> bool:
        """Check whether every requested model is ready."""
        try:
            request = urllib.request.Request(
                f"{self.addresses.http_url}/v2/health/ready", headers=self.security.headers()
            )
            with opened(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def require_running(self) -> None:
        """Check that the server is running.

        Raises:
            EngineError: it has exited.
        """
        if self.process.poll() is not None:
            raise EngineError(f"The server exited with code {self.process.returncode}:\n{self.last_words()}")

    def last_words(self) -> str:
        """Return the lines of this run's log that say why it failed."""
        return RunLog(self.log, self.log_start).last_words()

    def stop(self) -> None:
        """Stop when all running requests are answered and later ones refused, within a minute at most."""
        if self.process.poll() is None:
            is_drained = drained(self.drain, _DRAIN_S)
            stubs = {stub.pid for stub in stubs_of_server(self.pid)}
            # Triton would go on for up to 30 s while clients ask, and say NOT_FOUND at the end.
            if not is_drained or not stubs <= drained_processes(self.drain):
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_STOP_S)
            else:
                time.sleep(_LAST_ANSWERS_S)
        self.kill()

    def note_regions(self) -> None:
        """Write down its shared memory, which the next server removes if this process is killed."""
        note_regions(self.drain.parent, self._regions())

    def _regions(self) -> set[str]:
        regions = {stub.region for stub in stubs_of_server(self.pid)} | _mapped_regions(self.pid)
        return regions - {""}

    def kill(self) -> None:
        """Kill the server and its Python models immediately, and free their shared memory."""
        regions = self._regions()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in regions:
            (SHARED_MEMORY / region).unlink(missing_ok=True)


@contextlib.contextmanager
def running_server(
    repository: str | os.PathLike[str],
    *,
    environment: ServerEnvironment,
    options: ServerOptions | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Server]:
    """Run a server: start it, wait until every model is ready and checked, and stop it on exit.

    Args:
        stop: Event that aborts waiting for the models to load.
        say: Receives a line on each model or folder that is left out; default: a warning in the log.

    Raises:
        EngineError: a port is in use, a model needs a GPU or does not load, or the server exits or times out;
            the message includes the server's log.
        OpeningCheckError: its answers to the opening probes differ from PyTorch's vectors.
        ManifestError: a file to be loaded does not match its checksum.
    """
    repository, options = Path(repository).resolve(), options or ServerOptions()
    say = LOGGER.warning if say is None else say
    require_repository(repository)
    models = _served_models(repository, options)
    require_no_gpu(repository, models.folders, models.names)
    for remark in models.remarks():
        say(remark)
    with plain_folder("babeltower-server-") as scratch:
        write_backends(environment, scratch / "backends", stock=options.backends)
        start = _Start(repository, environment, options, scratch, stop or threading.Event(), say)
        server = start.server(models)
        try:
            yield server
        finally:
            server.stop()


class _CrashError(EngineError):
    """The server died by a signal of its own while it loaded its models."""


@dataclass(frozen=True, slots=True)
class _Start:
    """Start of a server, repeated if it crashes, and without the models that do not load where allowed."""

    repository: Path
    environment: ServerEnvironment
    options: ServerOptions
    scratch: Path
    stop: threading.Event
    say: Callable[[str], None]

    def server(self, models: ServedModels) -> Server:
        """Return a ready and checked server."""
        n_crashes = 0
        for attempt in itertools.count():
            linked = linked_repository(
                self.repository,
                models.folders,
                self.scratch / f"models-{attempt}",
                whole=self.options.explicit,
            )
            log = log_of_run(self.options.log or self.scratch / "server.log")
            server = _started(
                linked,
                models.folders,
                self.environment,
                self.options,
                backends=self.scratch / "backends",
                sockets=self.options.sockets or self.scratch,
                log=log,
                drain=self.scratch / f"drain-{attempt}",
            )
            server = dataclasses.replace(server, left_out=tuple(models.broken))
            try:
                self._require(server, models)
                return server
            except BabeltowerError as error:
                server.stop()
                rest = self._without_broken(models, error, log) if self.options.leave_broken else None
                if rest is not None:
                    models = rest
                elif isinstance(error, _CrashError) and n_crashes < _MOST_CRASHES:
                    n_crashes += 1
                    self.say(f"{error}\nThe server is started again.")
                else:
                    raise
            except BaseException:
                server.stop()
                raise
        raise AssertionError("unreachable")

    def _require(self, server: Server, models: ServedModels) -> None:
        _wait_until_ready(server, self.options.ready_s, self.stop)
        if self.options.verify:
            require_right_answers(
                server.addresses.http_url,
                self.repository,
                _ready_models(server),
                names=models.names,
                headers=server.security.headers(),
            )

    def _without_broken(
        self, models: ServedModels, error: BabeltowerError, log: RunLog
    ) -> ServedModels | None:
        folders = [error.tower] if isinstance(error, OpeningCheckError) else log.failed_models()
        rest: ServedModels | None = models
        for folder in folders:
            rest = None if rest is None else rest.without(folder, str(error), self.repository)
        if not folders or rest is None:
            return None
        for name in sorted(set(models.names) - set(rest.names)):
            self.say(f"left out: {name}: {error}")
        return rest


def _served_models(repository: Path, options: ServerOptions) -> ServedModels:
    """Select the models to load; a model that a command is just changing is not broken."""
    found: list[ServedModels] = []

    def select(*, leave_broken: bool = False) -> None:
        found.append(
            served_models(repository, _models(options), verify=options.verify, leave_broken=leave_broken)
        )

    try:
        while_changed(repository, select)
    except ManifestError:
        if not options.leave_broken:
            raise
        select(leave_broken=True)
    return found[-1]


def _mapped_regions(pid: int) -> set[str]:
    """Return the regions of Python models that a server has mapped, of dead ones too; none if it is gone."""
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        return set(re.findall(f"{SHARED_MEMORY}/({REGION.pattern})", maps))
    return set()


def require_repository(repository: Path) -> None:
    """Check that a repository is there, before an environment is made for its server.

    Raises:
        EngineError: it is a model, not a folder, or it holds no models.
    """
    if repository.name not in ("", "..") and manifest_path(repository).is_file():
        raise EngineError(
            f"{repository} is a model, not a repository. A server serves every model of one: pass "
            f"{repository.parent}."
        )
    if not repository.is_dir():
        raise EngineError(f"{repository} is not a folder. Pass the folder that `babeltower export` wrote to.")
    if not names_in_repository(repository) and not any(repository.glob(f"*/{CONFIG_FILE}")):
        raise EngineError(f"{repository} holds no models. Pass the folder that `babeltower export` wrote to.")


def _started(
    repository: Path,
    models: Sequence[str],
    environment: ServerEnvironment,
    options: ServerOptions,
    *,
    backends: Path,
    sockets: Path,
    log: RunLog,
    drain: Path,
) -> Server:
    http, grpc, metrics = _endpoints(options, sockets)
    command = [
        str(environment.triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={_EXIT_S}",
        f"--http-address={http.host}",
        f"--grpc-address={grpc.host}",
        f"--metrics-address={metrics.host}",
        f"--http-port={http.port}",
        f"--grpc-port={grpc.port}",
        f"--metrics-port={metrics.port}",
        *_model_arguments(models, options),
        *options.security.arguments(control=options.explicit),
        *options.arguments,
    ]
    with log.path.open("ab") as output, owner_descriptor(drain.parent) as owner:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_variables(environment), DRAIN_VARIABLE: str(drain), **options.environment},
            start_new_session=True,
            pass_fds=(owner,),
            preexec_fn=_die_with_parent,
        )
    # Triton's HTTP takes the path as it is; its gRPC adds the port to it.
    addresses = Addresses(http.host if http.is_socket else str(http), str(grpc), str(metrics))
    return Server(addresses, process, log.path, drain, options.security, log.start)


def _models(options: ServerOptions) -> tuple[str, ...] | None:
    """Return the Triton models to load at the start; ``None`` for all."""
    return options.models if options.models or options.explicit else None


def _ready_models(server: Server) -> set[str]:
    return {str(model["name"]) for model in server.models() if model.get("state") == "READY"}


def _model_arguments(models: Sequence[str], options: ServerOptions) -> list[str]:
    if not options.explicit:
        return []
    return ["--model-control-mode=explicit", *(f"--load-model={model}" for model in models)]


def _variables(environment: ServerEnvironment) -> dict[str, str]:
    libraries = [environment.site_packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
    }
    return {
        **_ALLOCATOR,
        **inherited,
        "PATH": f"{environment.folder / 'bin'}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join(map(str, filter(None, libraries))),
    }


def _die_with_parent() -> None:
    """Make the kernel stop the server if this process is killed (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """Address that one of Triton's endpoints listens on."""

    host: str
    port: int

    @property
    def is_socket(self) -> bool:
        """Whether it is a Unix socket, whose port is a part of its name only."""
        return self.host.startswith(UNIX)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _endpoints(options: ServerOptions, sockets: Path) -> tuple[_Endpoint, _Endpoint, _Endpoint]:
    """Return the endpoints of HTTP, gRPC and metrics: Unix sockets behind a gateway, else ports."""
    http = _Endpoint(options.host, options.http_port)
    grpc = _Endpoint(options.host, options.grpc_port)
    metrics = _Endpoint(options.metrics_host or options.host, options.metrics_port)
    if options.security.guarded:
        http = _Endpoint(f"{UNIX}{sockets / 'http'}", 1)
    if options.guards_grpc:
        grpc = _Endpoint(f"{UNIX}{sockets / 'grpc'}", 2)
    for endpoint in (http, grpc):
        if endpoint.is_socket:  # of a server that was killed
            Path(endpoint.host.removeprefix(UNIX)).unlink(missing_ok=True)
            Path(str(endpoint).removeprefix(UNIX)).unlink(missing_ok=True)
    ports = iter(_ports([end for end in (http, grpc, metrics) if not end.is_socket]))
    http, grpc, metrics = (
        end if end.is_socket else dataclasses.replace(end, port=next(ports)) for end in (http, grpc, metrics)
    )
    return http, grpc, metrics


def _ports(endpoints: Sequence[_Endpoint]) -> list[int]:
    """Return the requested or free ports; all are bound at once, so that they differ."""
    given = [end.port for end in endpoints if end.port]
    if len(set(given)) < len(given):
        raise EngineError(f"HTTP, gRPC and metrics have the ports {given}; choose a different one for each.")
    with contextlib.ExitStack() as held:
        found = []
        for host, port in [(end.host, end.port) for end in endpoints]:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                _bind(listener, host, port)
            except socket.gaierror as error:
                raise EngineError(f"{host!r} is no address to listen on: {error.strerror}.") from None
            except OverflowError:
                raise EngineError(f"{port} is no port; expected 0 to 65535.") from None
            except OSError as error:
                raise EngineError(
                    f"Port {port} of {host} cannot be used: {error.strerror}. Choose another port."
                ) from None
            found.append(int(listener.getsockname()[1]))
    return found


def _bind(listener: socket.socket, host: str, port: int) -> None:
    """Bind a port; the server of a killed `serve` holds it for some seconds more."""
    give_up_at = time.monotonic() + _EXIT_S + 2
    while True:
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)
        else:
            return


def _wait_until_ready(server: Server, ready_s: float, stop: threading.Event) -> None:
    deadline = time.monotonic() + ready_s
    while not server.is_ready():
        if stop.wait(0.05):
            raise EngineError("The server was stopped while loading its models.")
        if (code := server.process.poll()) is not None:
            kind = _CrashError if -code in _CRASHES else EngineError
            raise kind(f"The server exited with code {code} while loading its models:\n{server.last_words()}")
        if time.monotonic() > deadline:
            raise EngineError(f"The server was not ready after {ready_s:.0f} s:\n{server.last_words()}")
