"""Command ``serve``."""

from __future__ import annotations

import signal
import threading
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.errors import InputError

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
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Response cache in MB, for front ends exported with one.")
    ] = 0,
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
    log: Annotated[Path | None, typer.Option(help="File for the server's log.")] = None,
) -> None:
    """Serve a repository with Triton: texts and image files in, vectors out.

    Before the models are listed, every file is checked against its checksum, and every tower's vectors for a
    few probes against PyTorch's.

    A server started here has no GPU: it leaves out the towers that need one, and refuses a model whose front
    ends call them.

    Runs until interrupted (Ctrl-C or SIGTERM); running requests are answered first.
    """
    from runtime.server.process import ServerOptions, require_repository, running_server

    require_repository(repository)
    if target is ServeTarget.GPU or write is not None:
        from runtime.server.containers import deployment_from_repository

        given = {
            "--host": host != _HOST,
            "--port": port != _PORTS[0],
            "--grpc-port": grpc_port != _PORTS[1],
            "--metrics-port": metrics_port != _PORTS[2],
            "--cache-mb": cache_mb != 0,
            "--backends": backends is not None,
            "--log": log is not None,
        }
        if ignored := [name for name, is_given in given.items() if is_given]:
            raise InputError(
                f"{' and '.join(ignored)} apply to a server that is started here, not to a container. Leave "
                "them out, and edit the written files instead."
            )
        lines = deployment_from_repository(
            repository, write, target=target.value, shared_memory=shared_memory
        )
        for line in lines:
            typer.echo(line)
        return
    from runtime.server.devices import models_without_gpu, towers_of_repository
    from runtime.server.environment import default_folder, environment_from_folder
    from runtime.server.served_models import readable_models

    readable = readable_models(repository) or None
    models = models_without_gpu(repository, readable)
    if models is not None:
        towers = towers_of_repository(repository, readable)
        left_out = sorted(tower.folder.name for tower in towers if tower.on_gpu)
        typer.echo(f"left out, since they need a GPU: {', '.join(left_out)}", err=True)

    folder = env or default_folder()
    if not folder.exists():
        typer.echo(f"creating the server's environment in {folder} (once, about 700 MB) …", err=True)
    options = ServerOptions(
        host=host,
        http_port=port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        cache_bytes=cache_mb * 1_000_000,
        models=models or (),
        leave_broken=True,
        backends=backends,
        log=log,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    environment = environment_from_folder(folder)
    with running_server(
        repository,
        environment=environment,
        options=options,
        stop=stop,
        say=lambda line: typer.echo(line, err=True),
    ) as server:
        _show(server)
        while not stop.wait(0.2):
            server.require_running()


def _show(server: Server) -> None:
    for model in server.models():
        typer.echo(f"{model['name']} {model.get('version', '')} {model.get('state', '')}".rstrip())
    typer.echo(f"http     http://{server.addresses.http}")
    typer.echo(f"grpc     grpc://{server.addresses.grpc}")
    typer.echo(f"metrics  http://{server.addresses.metrics}/metrics")
