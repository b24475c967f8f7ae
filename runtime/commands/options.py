"""Options and output that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["AsJson", "Model", "cache_option", "device_option", "json_text"]

Model = Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def cache_option(panel: str) -> Any:
    """Return the option ``--cache``, for commands that open a model in process."""
    return typer.Option(
        metavar="FOLDER",
        envvar="BABELTOWER_CACHE",
        rich_help_panel=panel,
        help="Folder that records passed opening checks; default: in the user's cache.",
    )


def device_option(panel: str) -> Any:
    """Return the option ``--device``, for commands that open a model in process."""
    return typer.Option(
        metavar="cpu|cuda[:N]",
        envvar="BABELTOWER_DEVICE",
        rich_help_panel=panel,
        help="Where the towers run; default: the processor, or the first GPU for an engine that needs one.",
    )


def json_text(value: Any) -> str:
    """JSON as commands print it: indented, with every script readable."""
    return json.dumps(value, indent=2, ensure_ascii=False)
