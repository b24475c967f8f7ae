"""The ``babeltower frontends`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from runtime.extras import needing

__all__ = ["frontends"]


def frontends(
    model: Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")],
    variant: Annotated[
        str | None, typer.Option(help="Variant to serve, e.g. int8_openvino; the only one by default.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Number of processes per front end.")] = 2,
    max_queue_delay_us: Annotated[
        int, typer.Option(min=0, help="Maximum time in microseconds that a request waits to be batched.")
    ] = 0,
    token_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum rows × padded length of one text tower call; default: 2,048, on a GPU 16,384.",
        ),
    ] = None,
    tower_instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Concurrent calls per tower, 1 by default. The towers' configuration is rewritten only if "
            "one of the two --tower options is given.",
        ),
    ] = None,
    tower_threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per tower instance on a CPU; all cores by default."),
    ] = None,
) -> None:
    """Write the Triton front-end models that accept texts and image files and call a variant's towers."""
    with needing("Writing front ends", "babeltower[export]"):
        from export.triton.frontends import FrontEndSettings, frontends_from_model
        from export.triton.tower_config import TowerSettings

    towers = None
    if (tower_instances, tower_threads) != (None, None):
        towers = TowerSettings(instances=tower_instances or 1, threads=tower_threads)

    settings = FrontEndSettings(
        instances=instances,
        max_queue_delay_us=max_queue_delay_us,
        token_budget=token_budget,
    )
    for folder in frontends_from_model(model, variant=variant, settings=settings, towers=towers):
        typer.echo(folder)
