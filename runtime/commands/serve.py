"""Command ``serve``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.commands.options import (
    ca_file_option,
    connection_from_files,
    device_option,
    token_file_option,
)
from runtime.errors import BabeltowerError, InputError, RepositoryInUseError
from runtime.manifest import Modality, front_end_name
from runtime.preprocessing.served_limits import REQUEST_MEMORY_VARIABLE

if TYPE_CHECKING:
    from runtime.commands.doors import Door, GuardedAddresses
    from runtime.server.process import Server, ServerOptions
    from runtime.server.security import Security

__all__ = ["serve"]

_HOST, _PORTS = "127.0.0.1", (8000, 8001, 8002)
"""Default address, and ports of HTTP, gRPC and Prometheus."""

_MB = 1_000_000

_ACCESS, _API, _IMMICH = "Who may ask", "OpenAI-compatible interface", "In place of immich's service"


class Preload(str, Enum):
    """Towers that are opened before the first request."""

    BOTH = "both"
    TEXT = "text"
    IMAGE = "image"
    NONE = "none"

    def towers(self) -> frozenset[Modality]:
        """Return the towers."""
        return frozenset(tower for tower in Modality if self.value in ("both", tower.value))


class ServeTarget(str, Enum):
    """Hardware that the server runs on."""

    CPU = "cpu"
    GPU = "gpu"


def serve(
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPOSITORY",
            help="Folder written by `babeltower export`; or, with --http-api, the address of a served model.",
        ),
    ],
    target: Annotated[
        ServeTarget, typer.Option(help="cpu: start a server here; gpu: write the files of a container.")
    ] = ServeTarget.CPU,
    write: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --target gpu: output folder of the files.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; default: this machine only.")] = _HOST,
    port: Annotated[int, typer.Option(min=0, help="HTTP port; 0 picks a free one.")] = _PORTS[0],
    grpc_port: Annotated[int, typer.Option(min=0, help="gRPC port; 0 picks a free one.")] = _PORTS[1],
    metrics_port: Annotated[int, typer.Option(min=0, help="Prometheus port; 0 picks a free one.")] = _PORTS[
        2
    ],
    env: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            envvar="BABELTOWER_SERVER_ENV",
            help="Python environment of the server, created on first use; default: in the user's cache.",
        ),
    ] = None,
    backends: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Triton's own backends (FOLDER/onnxruntime/libtriton_onnxruntime.so, ...) instead of ours.",
        ),
    ] = None,
    shared_memory: Annotated[
        bool,
        typer.Option(
            "--shared-memory", help="Let clients on the server's machine pass images in shared memory."
        ),
    ] = False,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Let clients load and unload models, as `babeltower rollout` does.",
        ),
    ] = False,
    log: Annotated[Path | None, typer.Option(help="File for the server's log.")] = None,
    token_file: Annotated[Path | None, token_file_option(_ACCESS, "that every client must send")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(rich_help_panel=_ACCESS, help="Certificate chain (PEM) of HTTP and gRPC.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(rich_help_panel=_ACCESS, help="Key (PEM) of the certificate.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", rich_help_panel=_ACCESS, help="Let other machines in without a token or TLS."
        ),
    ] = False,
    guard: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_ACCESS,
            help="Bound requests before they reach Triton; --no-guard lets its own servers listen.",
        ),
    ] = True,
    request_memory: Annotated[
        int | None,
        typer.Option(
            min=16,
            metavar="MB",
            rich_help_panel=_ACCESS,
            help="Memory that a request may take in all processes: images, and decoding them; default: 64.",
        ),
    ] = None,
    http_api: Annotated[
        bool,
        typer.Option(
            "--http-api",
            rich_help_panel=_API,
            help="Also answer POST /v1/embeddings, and immich's /predict.",
        ),
    ] = False,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", rich_help_panel=_API, help="With --http-api: no Triton; this process computes."
        ),
    ] = False,
    device: Annotated[str | None, device_option(_API, "With --in-process: ", in_environment=False)] = None,
    default_language: Annotated[
        str | None, typer.Option(rich_help_panel=_API, help="Language of texts whose request names none.")
    ] = None,
    upstream_token_file: Annotated[
        Path | None, token_file_option(_API, "of the server, if REPOSITORY is an address")
    ] = None,
    ca_file: Annotated[Path | None, ca_file_option(_API)] = None,
    unload_after: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_API,
            metavar="SECONDS",
            min=1,
            help="With --in-process: give a tower's memory back after SECONDS without a request.",
        ),
    ] = None,
    preload: Annotated[
        Preload | None,
        typer.Option(
            rich_help_panel=_API,
            help="With --in-process: towers to open at the start, which then stay; others are opened by the "
            "first request. Default: both, or none with --unload-after.",
        ),
    ] = None,
    immich_name: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_IMMICH,
            metavar="NAME=MODEL",
            help="Answer for MODEL when immich asks for NAME; may be repeated.",
        ),
    ] = None,
    other_tasks_url: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_IMMICH,
            metavar="URL",
            help="Pass faces and OCR on to immich's own machine-learning service.",
        ),
    ] = None,
) -> None:
    """Serve a repository with Triton: texts and image files in, vectors out.

    Before the models are listed, every file is checked against its checksum, and every tower's vectors for a
    few probes against PyTorch's.

    A server started here has no GPU: it leaves out the towers that need one, and refuses a model whose front
    ends call them.

    Runs until interrupted (Ctrl-C or SIGTERM); running requests are answered first. A server that dies or
    hangs, or one of its Python models, is started again; if it does not last, the command fails.

    What a killed command left in the repository is finished or undone first, and said.
    """
    if "://" not in repository:
        _recover(Path(repository))
    if target is ServeTarget.GPU or write is not None:
        given = {
            "--host": host != _HOST,
            "--port": port != _PORTS[0],
            "--grpc-port": grpc_port != _PORTS[1],
            "--metrics-port": metrics_port != _PORTS[2],
            "--backends": backends is not None,
            "--log": log is not None,
            "--token-file": token_file is not None,
            "--tls-cert": tls_cert is not None,
            "--request-memory": request_memory is not None,
            "--http-api": http_api,
            "--device": device is not None,
        }
        _write_container(
            Path(repository),
            write,
            target,
            [name for name, is_given in given.items() if is_given],
            shared_memory=shared_memory,
            control=control,
        )
        return
    from runtime.commands.doors import Door, names_for_immich, require_service_url
    from runtime.gateway.options import GatewayOptions
    from runtime.remote.options import token_from_file
    from runtime.server.process import ServerOptions
    from runtime.server.security import Security, require_safe_exposure

    _require_ports(port, grpc_port, metrics_port)
    if ":" in host:
        raise InputError(
            f"--host {host} is an IPv6 address, and serve listens on IPv4. Pass --host 127.0.0.1 or 0.0.0.0."
        )
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # its handlers write among serve's own lines
    token = None if token_file is None else token_from_file(token_file)
    security = Security(token, tls_cert, tls_key, shared_memory=shared_memory, guarded=guard)
    require_safe_exposure(host, security, insecure=insecure)
    if not http_api and (immich_name or other_tasks_url is not None):
        raise InputError("--immich-name and --other-tasks-url need --http-api, which answers immich.")
    if not in_process and (unload_after is not None or preload is not None):
        raise InputError("--unload-after and --preload need --in-process: Triton keeps its own models.")
    if other_tasks_url is not None:
        require_service_url(other_tasks_url)
    place = None if "://" in repository else Path(repository)
    names = names_for_immich(place, immich_name or []) if http_api else {}
    options_of_door = GatewayOptions(
        token, tls_cert, tls_key, default_language, immich_names=names, other_tasks_url=other_tasks_url
    )
    if request_memory is not None:
        options_of_door = options_of_door.with_memory(request_memory * _MB)
    door = Door(host, port, options_of_door)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is by nohup
            signal.signal(number, lambda *_: stop.set())
    _require_applicable(device, in_process=in_process, repository=repository)
    if in_process or "://" in repository:
        if not http_api:
            what = "--in-process" if in_process else f"REPOSITORY is an address, {repository}, which"
            raise InputError(f"{what} needs --http-api, the interface that is served then.")
        if preload is None:
            preload = Preload.BOTH if unload_after is None else Preload.NONE
        opened = _Openers(unload_after, preload.towers(), device, upstream_token_file, ca_file)
        _serve_models(door, repository, opened, stop)
        return
    if upstream_token_file is not None or ca_file is not None:
        raise InputError("--upstream-token-file and --ca-file are for a REPOSITORY that is an address.")
    if control:
        require_control_allowed(host, security)
    _require_guard(host, security, http_api=http_api, insecure=insecure)
    options = ServerOptions(
        host=host,
        metrics_host=_HOST if guard else None,
        http_port=0 if guard else port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        explicit=control,
        leave_broken=True,
        security=security,
        backends=backends,
        log=log,
        environment={} if request_memory is None else {REQUEST_MEMORY_VARIABLE: str(request_memory)},
    )
    _serve_repository(door, Path(repository), options, env, stop, http_api=http_api)


def _require_ports(*ports: int) -> None:
    """Check the ports of HTTP, gRPC and metrics."""
    for port in ports:
        if port > 65_535:
            raise InputError(f"{port} is no port; expected 0 to 65535.")
    given = [port for port in ports if port]
    if len(set(given)) < len(given):
        raise InputError(f"HTTP, gRPC and metrics have the ports {ports}; choose a different one for each.")


def _recover(repository: Path) -> None:
    """Finish or undo what a killed command left in a repository, after a check that it is one."""
    from runtime.server.process import require_repository
    from runtime.server.recovery import recover_before_start

    require_repository(repository)
    recover_before_start(repository, lambda line: typer.echo(line, err=True))


def _write_container(
    repository: Path,
    write: Path | None,
    target: ServeTarget,
    ignored: list[str],
    *,
    shared_memory: bool,
    control: bool,
) -> None:
    from runtime.server.containers import deployment_from_repository

    if ignored:
        raise InputError(
            f"{' and '.join(ignored)} apply to a server that is started here, not to a container. Leave "
            "them out, and edit the written files instead."
        )
    lines = deployment_from_repository(
        repository, write, target=target.value, shared_memory=shared_memory, control=control
    )
    for line in lines:
        typer.echo(line)


def _require_guard(host: str, security: Security, *, http_api: bool, insecure: bool) -> None:
    """Check that the gateway can stand before Triton's HTTP server, or need not."""
    from runtime.commands.doors import require_gateway
    from runtime.remote.options import is_loopback

    if security.guarded:
        require_gateway("The HTTP port", remedy="Or pass --no-guard, if only you reach this machine.")
        return
    if http_api:
        raise InputError("--http-api is answered by the guard of the HTTP port; leave out --no-guard.")
    if security.certificate is not None:
        raise InputError("Triton's own HTTP server has no TLS; leave out --no-guard.")
    if not is_loopback(host) and not insecure:
        raise InputError(
            f"--no-guard with --host {host} lets other machines reach Triton's own HTTP server, whose holes "
            "need no token (docs/security.md). Leave one of them out, or say --insecure."
        )


def _require_applicable(device: str | None, *, in_process: bool, repository: str) -> None:
    """Check that a device is named only where this process computes."""
    if device is None:
        return
    if "://" in repository:
        raise InputError(f"--device is set on the server; leave it out with the address {repository}.")
    if not in_process:
        raise InputError(
            "--device is for --in-process. Triton runs each tower on the kind of device that it was exported "
            "for; `serve --target gpu` says which run on a GPU."
        )


@dataclass(frozen=True, slots=True)
class _Openers:
    """Options of models that are served without Triton: in this process, or at an address."""

    unload_after_s: float | None
    preload: frozenset[Modality]
    device: str | None
    upstream_token_file: Path | None
    ca_file: Path | None


def _serve_models(door: Door, place: str, options: _Openers, stop: threading.Event) -> None:
    """Run the gateway in front of an address, or of the models of a repository in this process."""
    from runtime.commands.doors import local_models, require_gateway, running_door

    require_gateway("--http-api")
    from runtime.gateway.models import Residence, local_opener, remote_opener
    from runtime.remote.options import address_from_text

    with contextlib.ExitStack() as stack:
        if "://" in place:
            address = address_from_text(place)
            connection = connection_from_files(options.upstream_token_file, options.ca_file)
            openers = [remote_opener(address, connection)]
        else:
            residence = Residence(options.unload_after_s, options.preload)
            models = local_models(
                Path(place), door.options.default_language, options.preload, device=options.device
            )
            memory = door.options.request_memory_bytes
            openers = [
                local_opener(stack.enter_context(model), residence, memory_bytes=memory) for model in models
            ]
        url = stack.enter_context(running_door(door, openers))
        _show_immich_names(door)
        typer.echo(f"http     {url}")
        stop.wait()


def _show_immich_names(door: Door) -> None:
    for name, model in door.options.immich_names.items():
        typer.echo(f"immich   {name} is {model}")


def _serve_repository(
    door: Door,
    repository: Path,
    options: ServerOptions,
    env: Path | None,
    stop: threading.Event,
    *,
    http_api: bool,
) -> None:
    """Keep a Triton server running until it is stopped, behind the gateway if its HTTP port is guarded."""
    from runtime.commands.doors import GuardedAddresses, guarded_server
    from runtime.server.devices import models_of_repository, models_without_gpu, towers_of_repository
    from runtime.server.environment import default_folder, environment_from_folder
    from runtime.server.scratch import plain_folder
    from runtime.server.served_models import readable_models
    from runtime.server.supervision import Health, supervised

    readable = readable_models(repository) or None
    if models_without_gpu(repository, readable) is not None:
        towers = towers_of_repository(repository, readable)
        left_out = sorted(tower.folder.name for tower in towers if tower.on_gpu)
        typer.echo(f"left out, since they need a GPU: {', '.join(left_out)}", err=True)
    folder = env or default_folder()
    if not folder.exists():
        typer.echo(f"creating the server's environment in {folder} (once, about 700 MB) …", err=True)

    def chosen() -> ServerOptions:
        names = readable_models(repository) or None
        found = models_without_gpu(repository, names)
        if found is None and options.explicit:
            found = models_of_repository(repository, names)
        return dataclasses.replace(options, models=found or ())

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if options.security.guarded:
        from runtime.gateway.serving import require_free_port

        require_free_port(door.host, door.port)
        if options.guards_grpc:
            require_free_port(door.host, options.grpc_port)
    health = Health()
    with contextlib.ExitStack() as doors:
        options = dataclasses.replace(
            options, sockets=doors.enter_context(plain_folder("babeltower-sockets-"))
        )
        reached: list[GuardedAddresses] = []

        def started(server: Server) -> None:
            if options.security.guarded and not reached:  # it stays when the server is started again
                loaded = {model["name"] for model in server.models() if model.get("state") == "READY"}
                names = readable_models(repository)
                names = [name for name in names if front_end_name(name, Modality.TEXT) in loaded]
                gateway = guarded_server(
                    door,
                    server,
                    names,
                    http_api=http_api,
                    grpc_port=options.grpc_port,
                    is_healthy=health.is_good,
                )
                reached.append(doors.enter_context(gateway))
            own = GuardedAddresses(server.addresses.http_url, server.addresses.grpc)
            _show(server, reached[0] if reached else own)
            _show_immich_names(door)

        supervised(
            repository,
            environment=environment_from_folder(folder),
            options=chosen,
            stop=stop,
            started=started,
            say=say,
            each_look=_settler(repository, control=options.explicit, say=say),
            health=health,
        )


def require_control_allowed(host: str, security: Security) -> None:
    """Check that not everybody can reach a server whose models clients may load.

    Raises:
        InputError: strangers can: to load a model is to run its code.
    """
    from runtime.remote.options import is_loopback

    if not is_loopback(host) and security.token is None:
        raise InputError(
            f"--control lets every client that reaches the server load models, which run code, and --host "
            f"{host} lets other machines reach it. Leave out one of the two, or pass --token-file."
        )


def _settler(repository: Path, *, control: bool, say: Callable[[str], None]) -> Callable[[Server], None]:
    """Return a function that finishes or undoes a killed rollout, on the files and on the running server."""
    from runtime.server.recovery import recover_files

    said: set[str] = set()

    def settle_killed(server: Server) -> None:
        try:
            if recover_files(repository, say) and control:
                from runtime.commands.doors import place_of_model
                from runtime.repository import staging
                from runtime.rollout import Control, settle

                with (
                    contextlib.closing(Control(*place_of_model(server, "model"))) as client,
                    staging(repository, "serve") as stage,
                ):
                    settle(repository, stage, client, say)
        except RepositoryInUseError:
            pass  # by a rollout, which settles first itself
        except (BabeltowerError, OSError) as error:
            if str(error) not in said:
                said.add(str(error))
                say(f"{error} The server keeps on serving what it serves.")

    return settle_killed


def _show(server: Server, reached: GuardedAddresses) -> None:
    for model in server.models():
        typer.echo(f"{model['name']} {model.get('version', '')} {model.get('state', '')}".rstrip())
    secure = "s" if server.security.certificate else ""
    typer.echo(f"http     {reached.http_url}")
    typer.echo(f"grpc     grpc{secure}://{reached.grpc}")
    typer.echo(f"metrics  http://{server.addresses.metrics}/metrics")
