"""The ``babeltower frontends`` command."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from runtime.extras import needing

__all__ = ["frontends"]


class TowerDevice(str, Enum):
    """Device of a tower; a copy of ``Device`` that avoids its heavy imports."""

    CPU = "cpu"
    GPU = "gpu"


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
        int, typer.Option(min=1, help="Maximum rows × padded length of one text tower call.")
    ] = 2_048,
    response_cache: Annotated[
        bool, typer.Option("--response-cache", help="Answer repeated requests from the server's cache.")
    ] = False,
    tower_instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Concurrent calls per tower, 1 by default. The towers' configuration is rewritten only if "
            "one of the three --tower options is given.",
        ),
    ] = None,
    tower_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads per tower instance; all cores by default.")
    ] = None,
    tower_device: Annotated[
        TowerDevice | None,
        typer.Option(help="Device of the FP32 and FP16 ONNX Runtime towers; cpu by default."),
    ] = None,
) -> None:
    """Write the Triton front-end models that accept texts and image files and call a variant's towers."""
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
