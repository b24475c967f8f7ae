"""Command ``ready``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import ca_file_option, connection_from_files, token_file_option
from runtime.errors import InputError, ManifestError

__all__ = ["ready"]

_SERVER = "Server"


def ready(
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="The repository that is served.")],
    url: Annotated[str, typer.Option(help="http://HOST:PORT of its server.")] = "http://127.0.0.1:8000",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 3.0,
    token_file: Annotated[Path | None, token_file_option(_SERVER, "sent with every request")] = None,
    ca_file: Annotated[Path | None, ca_file_option(_SERVER)] = None,
) -> None:
    """Check that every model of a server embeds a probe text and a probe image as PyTorch does.

    Exit code 1 if one does not, with the reason. Triton's own readiness stays true when a Python model dies.
    A busy server is ready.
    """
    import ssl
    import zipfile

    from runtime.remote.options import WireProtocol
    from runtime.server.readiness import HttpEndpoint, faults_of_server, probes_of_repository

    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an HTTP address; expected http://HOST:PORT.")
    connection = connection_from_files(token_file, ca_file)
    headers = connection.all_headers(WireProtocol.HTTP)
    context = None if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    try:
        probes = probes_of_repository(repository)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ManifestError(
            f"The probes of {repository} cannot be read: {error}. Export the checkpoint again."
        ) from error
    if not probes:
        raise ManifestError(f"{repository} has no model with front ends, so there is nothing to ask.")
    faults = faults_of_server(HttpEndpoint(url, headers, context), probes, timeout)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)
    for probe in probes:
        typer.echo(f"{probe.model} is ready")
