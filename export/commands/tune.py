"""The ``babeltower tune`` command."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from runtime.extras import needing

__all__ = ["tune"]


class FrontEndChoice(str, Enum):
    """Front ends to tune."""

    TEXT = "text"
    IMAGE = "image"
    BOTH = "both"


def tune(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME", help="A model with front ends.")],
    tower: Annotated[
        FrontEndChoice, typer.Option(help="Front end to tune, with its tower.")
    ] = FrontEndChoice.TEXT,
    p99_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Limit on p99 latency in ms; that of the default configuration if omitted."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="Time budget per front end.")] = 10.0,
    clients: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one load measurement.")] = 4.0,
    rounds: Annotated[
        int, typer.Option(min=6, help="Paired measurements that confirm the best against the default.")
    ] = 8,
    texts: Annotated[
        Path | None, typer.Option(help="File of typical texts, one per line; sample captions by default.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of --texts, e.g. por_Latn.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of typical images; the sample images by default.")
    ] = None,
    env: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            envvar="BABELTOWER_SERVER_ENV",
            help="Python environment of the server, as for `babeltower serve`.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure without writing anything.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per front end.")] = False,
) -> None:
    """Find and save the fastest serving configuration of REPOSITORY/NAME within a latency limit.

    Searches tower instances and threads, and front-end processes, queue delay, batch size and token budget,
    on a real server under load. The best candidate is then measured alternately with the default; the
    configuration files change only if it is significantly faster. A server reads them when it next loads the
    models. Reports are written to NAME_text.tuning.json, .md and .png.
    """
    with needing("Tuning", "babeltower[export]"):
        from rich.console import Console

        from export.commands.progress import progress_bars
        from export.tuning import TuneOptions, require_tunable, tuning_of_model
    from runtime.manifest import Modality
    from runtime.server import default_folder, environment_from_folder

    modalities = tuple(Modality) if tower is FrontEndChoice.BOTH else (Modality(tower.value),)
    options = {
        modality: TuneOptions(
            p99_ms=p99_ms,
            minutes=minutes,
            clients=clients,
            seconds=seconds,
            rounds=rounds,
            source=texts if modality is Modality.TEXT else images,
            language=language,
            writes=not dry_run,
        )
        for modality in modalities
    }
    for modality in modalities:  # before minutes are spent on the server's environment
        require_tunable(model, modality, options[modality])
    environment = environment_from_folder(env or default_folder())
    for modality in modalities:
        with progress_bars(Console(stderr=True)) as progress:
            tuning = tuning_of_model(model, modality, environment, options[modality], progress)
        typer.echo(json.dumps(tuning.as_json()) if as_json else "\n".join(tuning.summary()))
