"""``babeltower frontends``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["frontends"]


def frontends(
    model: Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")],
    variant: Annotated[
        str | None, typer.Option(help="Which variant to serve, e.g. int8_openvino; the only one by default.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Processes of each front end.")] = 2,
    max_queue_delay_us: Annotated[
        int, typer.Option(min=0, help="Microseconds that a lone request waits for company.")
    ] = 0,
    token_budget: Annotated[
        int, typer.Option(min=1, help="Rows × padded length of one call of the text tower.")
    ] = 2_048,
    response_cache: Annotated[
        bool, typer.Option("--response-cache", help="Answer repeated requests from the server's cache.")
    ] = False,
) -> None:
    """Write the Triton models that take texts and image files, in front of a variant's towers."""
    from export.frontends import FrontEndSettings, frontends_from_model
    from triton_models.spec import TextLimits

    settings = FrontEndSettings(
        instances=instances,
        max_queue_delay_us=max_queue_delay_us,
        response_cache=response_cache,
        text=TextLimits(token_budget=token_budget),
    )
    for folder in frontends_from_model(model, variant=variant, settings=settings):
        typer.echo(folder)
