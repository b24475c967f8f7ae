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
    A busy model is ready, and said to be busy: it answers others meanwhile, or `babeltower serve`, which
    watches its processes, says that they compute.
    """
    import ssl
    from urllib.parse import urlsplit

    from runtime.remote.options import WireProtocol
    from runtime.server.readiness import HttpEndpoint, probes_of_repository, results_of_probes

    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(f"{url} is not an HTTP address; expected http://HOST:PORT.")
    if parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise InputError(f"{url} is more than an address; expected http://HOST:PORT.")
    connection = connection_from_files(token_file, ca_file)
    headers = connection.all_headers(WireProtocol.HTTP)
    context = None if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    try:
        probes = probes_of_repository(repository)
    except ValueError as error:
        raise ManifestError(
            f"The probes of {repository} cannot be read: {error}. Export the checkpoint again."
        ) from error
    if not probes:
        raise ManifestError(f"{repository} has no model with front ends, so there is nothing to ask.")
    results = results_of_probes(HttpEndpoint(url, headers, context), probes, timeout)
    for found in results:
        if found.fault:
            typer.echo(found.fault, err=True)
    if any(found.fault for found in results):
        raise typer.Exit(1)
    for found in results:
        typer.echo(f"{found.model} is ready" + (", and busy" if found.is_busy else ""))
