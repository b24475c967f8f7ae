"""``babeltower frontends``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from runtime.extras import needing

__all__ = ["frontends"]


class TowerDevice(str, Enum):
    """Where towers run; ``Device`` without what it imports."""

    CPU = "cpu"
    GPU = "gpu"


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
    tower_instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calls of each tower that are computed at once, 1 by default. Without any of these three, "
            "towers stay as they are.",
        ),
    ] = None,
    tower_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each instance of a tower; every core by default.")
    ] = None,
    tower_device: Annotated[
        TowerDevice | None,
        typer.Option(help="Where ONNX Runtime's FP32 and FP16 towers run; cpu by default."),
    ] = None,
) -> None:
    """Write the Triton models that take texts and image files, in front of a variant's towers."""
    with needing("Writing front ends", "babeltower[export]"):
        from export.triton.frontends import FrontEndSettings, frontends_from_model
        from export.triton.tower_config import Device, TowerSettings
    from triton_models.spec import TextLimits

    towers = None
    if (tower_instances, tower_threads, tower_device) != (None, None, None):
        device = Device.CPU if tower_device is None else Device(tower_device.value)
        towers = TowerSettings(instances=tower_instances or 1, threads=tower_threads, device=device)

    settings = FrontEndSettings(
        instances=instances,
        max_queue_delay_us=max_queue_delay_us,
        response_cache=response_cache,
        text=TextLimits(token_budget=token_budget),
    )
    for folder in frontends_from_model(model, variant=variant, settings=settings, towers=towers):
        typer.echo(folder)
