"""``babeltower rollout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import Model, ca_file_option, connection_from_files, token_file_option

__all__ = ["rollout"]

_SERVER = "Server"


def rollout(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            metavar="REPOSITORY/NAME|VERSION",
            help="Model with the new version, or the number of a version served before.",
        ),
    ],
    url: Annotated[str, typer.Option(help="grpc://HOST:PORT of the server of the repository.")],
    variant: Annotated[
        str | None, typer.Option(help="Variant of the new model; default: the only one.")
    ] = None,
    token_file: Annotated[Path | None, token_file_option(_SERVER, "sent with every request")] = None,
    ca_file: Annotated[Path | None, ca_file_option(_SERVER)] = None,
) -> None:
    """Switch a served model to a new version under traffic, if its answers to the probes are correct.

    The new version is loaded beside the old one and probed; if a probe fails, everything is restored and the
    exit code is 1.
    """
    from runtime.rollout import roll_out

    connection = connection_from_files(token_file, ca_file)
    done = roll_out(
        model,
        int(to) if to.isdecimal() else to,
        url=url,
        variant=variant,
        connection=connection,
        say=lambda step: typer.echo(step, err=True),
    )
    language, mean = min(done.after.languages.items(), key=lambda item: item[1])
    typer.echo(
        f"{done.model.name} serves version {done.version}: {len(done.after.languages)} languages pass, the "
        f"worst, {language}, at a mean cosine of {mean:.6f}; images at {done.after.images:.6f}"
    )
