"""Command ``serve``."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.errors import BabeltowerError, InputError, RepositoryInUseError

if TYPE_CHECKING:
    from runtime.server.process import Server

__all__ = ["serve"]

_HOST, _PORTS = "127.0.0.1", (8000, 8001, 8002)
"""Default address, and ports of HTTP, gRPC and Prometheus."""


class ServeTarget(str, Enum):
    """Hardware that the server runs on."""

    CPU = "cpu"
    GPU = "gpu"


def serve(
    repository: Annotated[
        Path, typer.Argument(metavar="REPOSITORY", help="Folder written by `babeltower export`.")
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
            "--shared-memory",
            help="Let clients on the server's machine pass images in shared memory; a server that is started "
            "here always does.",
        ),
    ] = False,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Let clients load and unload models, which `babeltower rollout` needs; loopback only.",
        ),
    ] = False,
    log: Annotated[Path | None, typer.Option(help="File for the server's log.")] = None,
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
    from runtime.server.process import ServerOptions, require_repository
    from runtime.server.recovery import recover_before_start

    def say(line: str) -> None:
        typer.echo(line, err=True)

    require_repository(repository)
    recover_before_start(repository, say)
    if target is ServeTarget.GPU or write is not None:
        from runtime.server.containers import deployment_from_repository

        given = {
            "--host": host != _HOST,
            "--port": port != _PORTS[0],
            "--grpc-port": grpc_port != _PORTS[1],
            "--metrics-port": metrics_port != _PORTS[2],
            "--backends": backends is not None,
            "--log": log is not None,
        }
        if ignored := [name for name, is_given in given.items() if is_given]:
            raise InputError(
                f"{' and '.join(ignored)} apply to a server that is started here, not to a container. Leave "
                "them out, and edit the written files instead."
            )
        lines = deployment_from_repository(
            repository, write, target=target.value, shared_memory=shared_memory, control=control
        )
        for line in lines:
            typer.echo(line)
        return
    from runtime.server.devices import models_of_repository, models_without_gpu, towers_of_repository
    from runtime.server.environment import default_folder, environment_from_folder
    from runtime.server.supervision import supervised

    if control:
        require_control_allowed(host)
    models = models_without_gpu(repository)
    if models is not None:
        left_out = sorted(tower.folder.name for tower in towers_of_repository(repository) if tower.on_gpu)
        typer.echo(f"left out, since they need a GPU: {', '.join(left_out)}", err=True)

    folder = env or default_folder()
    if not folder.exists():
        typer.echo(f"creating the server's environment in {folder} (once, about 700 MB) …", err=True)

    def options() -> ServerOptions:
        found = models_without_gpu(repository)
        if found is None and control:
            found = models_of_repository(repository)
        return ServerOptions(
            host=host,
            http_port=port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            models=found or (),
            backends=backends,
            log=log,
        )

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is by nohup
            signal.signal(number, lambda *_: stop.set())
    supervised(
        repository,
        environment=environment_from_folder(folder),
        options=options,
        stop=stop,
        started=_show,
        say=say,
        each_look=_settler(repository, control=control, say=say),
    )


def require_control_allowed(host: str) -> None:
    """Check that only this machine's users can reach a server whose models clients may load.

    Raises:
        InputError: others can: to load a model is to run its code.
    """
    from runtime.remote.options import is_loopback

    if not is_loopback(host):
        raise InputError(
            f"--control lets every client that reaches the server load models, which run code, and --host "
            f"{host} lets other machines reach it. Leave out one of the two."
        )


def _settler(repository: Path, *, control: bool, say: Callable[[str], None]) -> Callable[[Server], None]:
    """Return a function that finishes or undoes a killed rollout, on the files and on the running server."""
    from runtime.server.recovery import recover_files

    said: set[str] = set()

    def settle_killed(server: Server) -> None:
        try:
            if recover_files(repository, say) and control:
                from runtime.remote import Connection, address_from_text
                from runtime.repository import staging
                from runtime.rollout import Control, settle

                address = address_from_text(f"grpc://{server.addresses.grpc}/model")
                with (
                    contextlib.closing(Control(address, Connection())) as client,
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


def _show(server: Server) -> None:
    for model in server.models():
        typer.echo(f"{model['name']} {model.get('version', '')} {model.get('state', '')}".rstrip())
    typer.echo(f"http     http://{server.addresses.http}")
    typer.echo(f"grpc     grpc://{server.addresses.grpc}")
    typer.echo(f"metrics  http://{server.addresses.metrics}/metrics")
