"""``babeltower rollout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import Model, ca_file_option, connection_from_files, token_file_option
from runtime.errors import InputError

__all__ = ["rollout"]

_SERVER = "Server"


def rollout(
    model: Model,
    url: Annotated[str, typer.Option(help="grpc://HOST:PORT of the server of the repository.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="REPOSITORY/NAME|VERSION",
            help="Model with the new version, or the number of a version served before.",
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Switch back to the version served before the last rollout.")
    ] = False,
    variant: Annotated[
        str | None, typer.Option(help="Variant of the new model; default: the only one.")
    ] = None,
    token_file: Annotated[Path | None, token_file_option(_SERVER, "sent with every request")] = None,
    ca_file: Annotated[Path | None, ca_file_option(_SERVER)] = None,
) -> None:
    """Switch a served model to a new version under traffic, if its answers to the probes are correct.

    The new version is loaded beside the old one and probed; if a probe fails, everything is restored and the
    exit code is 1. A rollout that was killed is undone or finished by the next command on the repository.

    The server must allow the loading of models: babeltower serve --control.
    """
    from runtime.rollout import roll_out, undo_rollout

    if undo == (to is not None) or (undo and variant is not None):
        raise InputError("Pass either --to REPOSITORY/NAME, --to VERSION, or --undo alone.")
    connection = connection_from_files(token_file, ca_file)

    def say(step: str) -> None:
        typer.echo(step, err=True)

    if to is None:
        done = undo_rollout(model, url=url, connection=connection, say=say)
    else:
        target = int(to) if to.isdecimal() else to
        done = roll_out(model, target, url=url, variant=variant, connection=connection, say=say)
    if done is None:
        typer.echo(
            f"the last rollout of {Path(model).name} was not finished and is undone already; "
            "--undo once more goes back one version further"
        )
        return
    language, mean = min(done.after.languages.items(), key=lambda item: item[1])
    typer.echo(
        f"{done.model.name} serves version {done.version}: {len(done.after.languages)} languages pass, the "
        f"worst, {language}, at a mean cosine of {mean:.6f}; images at {done.after.images:.6f}"
    )
