"""``babeltower tune``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from runtime.extras import needing

__all__ = ["tune"]


class Tuned(str, Enum):
    """Which front ends."""

    TEXT = "text"
    IMAGE = "image"
    BOTH = "both"


def tune(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME", help="A model with front ends.")],
    tower: Annotated[Tuned, typer.Option(help="Which front end, with the tower behind it.")] = Tuned.TEXT,
    p99_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Milliseconds that 99% of requests must keep; the default's own if left out."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="What tuning a front end may take.")] = 10.0,
    clients: Annotated[int, typer.Option(min=1, help="Requests that are under way at any time.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one stretch of load.")] = 4.0,
    rounds: Annotated[
        int, typer.Option(min=6, help="Pairs of stretches that confirm the best beside the default.")
    ] = 8,
    texts: Annotated[
        Path | None, typer.Option(help="Texts like yours, one a line; captions of the samples by default.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of --texts, e.g. por_Latn.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images like yours; the samples' by default.")
    ] = None,
    env: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            envvar="BABELTOWER_SERVER_ENV",
            help="The server's Python environment, as of `babeltower serve`.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a front end.")] = False,
) -> None:
    """Find how this machine serves REPOSITORY/NAME fastest within a latency, and write it down.

    Instances and threads of the tower, processes, queue delay, batch and token budget of the front end are
    searched on a real server under load. The best is then measured beside the default, in turns; only if it
    is faster beyond doubt do the configurations change; a server reads them when it next loads the models.
    NAME_text.tuning.json, .md and .png have it all.
    """
    with needing("Tuning", "babeltower[export]"):
        from rich.console import Console

        from export.commands.progress import progress_bars
        from export.tuning import TuneOptions, tuning_of_model
    from runtime.manifest import Modality
    from runtime.server import default_folder, environment_from_folder

    environment = environment_from_folder(env or default_folder())
    for modality in Modality if tower is Tuned.BOTH else (Modality(tower.value),):
        options = TuneOptions(
            p99_ms=p99_ms,
            minutes=minutes,
            clients=clients,
            seconds=seconds,
            rounds=rounds,
            source=texts if modality is Modality.TEXT else images,
            language=language,
            writes=not dry_run,
        )
        with progress_bars(Console(stderr=True)) as progress:
            tuning = tuning_of_model(model, modality, environment, options, progress)
        typer.echo(json.dumps(tuning.as_json()) if as_json else "\n".join(tuning.summary()))
