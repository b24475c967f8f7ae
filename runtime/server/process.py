"""One ``tritonserver`` process: started, waited for, and stopped with all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import EngineError
from runtime.server.backends import write_backends
from runtime.server.checks import require_right_answers, verify_served_files
from runtime.server.environment import ServerEnvironment

__all__ = ["Addresses", "Server", "ServerOptions", "running_server"]

_STOP_S = 30.0
_ERROR = re.compile(r"E\d{4} |error: |\w*Error: ")
"""How lines of the log begin that tell of a failure."""
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
"""Left to itself, glibc keeps what large requests took, in every one of up to eight arenas a core."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to serve.

    Attributes:
        host: Address to listen on; this machine alone by default.
        http_port, grpc_port, metrics_port: 0 takes a free port.
        cache_bytes: Size of the response cache, for models whose configuration asks for one; 0 for none.
        models: Load these alone (and let a client load and unload); all of the repository if empty.
        explicit: Load what ``models`` names, which may be nothing, and let a client load the rest.
        ready_s: How long loading may take.
        backends: Folder of Triton's own backends, used in place of those that come with us; see
            ``write_backends``.
        log: File for the server's messages; without one they are kept only while it runs.
        verify: Compare files with their checksums first, and answers to the opening probes with PyTorch's
            before the server is handed over.
        arguments: Further arguments of ``tritonserver``.
    """

    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    cache_bytes: int = 0
    models: tuple[str, ...] = ()
    explicit: bool = False
    ready_s: float = 300.0
    backends: Path | None = None
    log: Path | None = None
    verify: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server answers."""

    http: str
    grpc: str
    metrics: str


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    addresses: Addresses
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The server's process, which leads a group of its own."""
        return self.process.pid

    def models(self) -> Sequence[Mapping[str, Any]]:
        """Every model's name, version, state and reason, as the server tells it."""
        request = urllib.request.Request(
            f"http://{self.addresses.http}/v2/repository/index", data=b"{}", method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: Sequence[Mapping[str, Any]] = json.load(answer)
        return found

    def metrics(self) -> str:
        """The metrics page, in Prometheus' format."""
        with urllib.request.urlopen(f"http://{self.addresses.metrics}/metrics", timeout=10) as answer:
            page: str = answer.read().decode()
        return page

    def is_ready(self) -> bool:
        """Whether every model that was asked for answers."""
        try:
            with urllib.request.urlopen(f"http://{self.addresses.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def require_running(self) -> None:
        """Let a server that runs pass.

        Raises:
            EngineError: it ended by itself.
        """
        if self.process.poll() is not None:
            raise EngineError(
                f"The server ended with exit code {self.process.returncode}:\n{_last_words(self.log)}"
            )

    def stop(self) -> None:
        """Let running requests end, then stop; what does not stop in half a minute is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
        self.kill()

    def kill(self) -> None:
        """End the server and its Python models at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running_server(
    repository: str | os.PathLike[str],
    *,
    environment: ServerEnvironment,
    options: ServerOptions | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Server]:
    """Start a server, wait until every model is ready and right, and stop it on the way out.

    Args:
        stop: Once it is set, loading is no longer waited for.

    Raises:
        EngineError: a port is taken, a model does not load, or the server ends or takes too long; the message
            has the server's own words.
        OpeningCheckError: it answers the opening probes with other vectors than PyTorch's.
        ManifestError: a file that it would load does not fit its checksum.
    """
    repository, options = Path(repository).resolve(), options or ServerOptions()
    if not repository.is_dir():
        raise EngineError(f"{repository} is not a folder. Pass the folder that `babeltower export` wrote to.")
    if options.verify:
        verify_served_files(repository, _models(options))
    with tempfile.TemporaryDirectory(prefix="babeltower-server-") as scratch:
        backends = Path(scratch) / "backends"
        write_backends(environment, backends, stock=options.backends)
        log = options.log or Path(scratch) / "server.log"
        server = _started(repository, environment, options, backends=backends, log=log)
        try:
            _wait_until_ready(server, options.ready_s, stop or threading.Event())
            if options.verify:
                require_right_answers(server.addresses.http, repository, _ready_models(server))
            yield server
        finally:
            server.stop()


def _started(
    repository: Path,
    environment: ServerEnvironment,
    options: ServerOptions,
    *,
    backends: Path,
    log: Path,
) -> Server:
    http, grpc, metrics = _ports(options)
    command = [
        str(environment.triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--cache-directory={environment.triton / 'caches'}",
        "--disable-auto-complete-config",
        f"--http-address={options.host}",
        f"--grpc-address={options.host}",
        f"--metrics-address={options.host}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        *_model_arguments(options),
        *([f"--cache-config=local,size={options.cache_bytes}"] if options.cache_bytes else []),
        *options.arguments,
    ]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_variables(environment), **options.environment},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    addresses = Addresses(*(f"{options.host}:{port}" for port in (http, grpc, metrics)))
    return Server(addresses, process, log)


def _models(options: ServerOptions) -> tuple[str, ...] | None:
    """Triton models that are loaded at the start; ``None`` for all."""
    return options.models if options.models or options.explicit else None


def _ready_models(server: Server) -> set[str]:
    return {str(model["name"]) for model in server.models() if model.get("state") == "READY"}


def _model_arguments(options: ServerOptions) -> list[str]:
    models = _models(options)
    if models is None:
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
        "PYTHONDONTWRITEBYTECODE": "1",  # the repository stays as it was written
    }


def _die_with_parent() -> None:
    """Have the kernel stop the server if this process is killed (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _ports(options: ServerOptions) -> tuple[int, int, int]:
    """The asked ports, or free ones; all are held at once, so that no two are the same."""
    asked = (options.http_port, options.grpc_port, options.metrics_port)
    with contextlib.ExitStack() as held:
        found = []
        for port in asked:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((options.host, port))
            except OSError as error:
                raise EngineError(
                    f"Port {port} of {options.host} cannot be taken: {error.strerror}."
                ) from None
            found.append(int(listener.getsockname()[1]))
    http, grpc, metrics = found
    return http, grpc, metrics


def _wait_until_ready(server: Server, ready_s: float, stop: threading.Event) -> None:
    deadline = time.monotonic() + ready_s
    while not server.is_ready():
        if stop.wait(0.05):
            raise EngineError("The server was stopped while it loaded its models.")
        if server.process.poll() is not None:
            raise EngineError(
                f"The server ended with exit code {server.process.returncode} while it loaded its models:\n"
                f"{_last_words(server.log)}"
            )
        if time.monotonic() > deadline:
            raise EngineError(f"The server was not ready after {ready_s:.0f} s:\n{_last_words(server.log)}")


def _last_words(log: Path, n_lines: int = 12) -> str:
    """The server's errors, or its last lines where it printed none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if _ERROR.match(line)]
    return "\n".join((errors or lines)[-n_lines:])
