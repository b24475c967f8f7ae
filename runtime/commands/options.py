"""Options and output that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["AsJson", "Model", "cache_option", "json_text"]

Model = Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def cache_option(panel: str) -> Any:
    """Option of every command that opens a model in process: where passed opening checks are remembered."""
    return typer.Option(
        metavar="FOLDER",
        envvar="BABELTOWER_CACHE",
        rich_help_panel=panel,
        help="Remembers which towers gave PyTorch's vectors here; in the user's cache by default.",
    )


def json_text(value: Any) -> str:
    """JSON as commands print it: indented, with every script readable."""
    return json.dumps(value, indent=2, ensure_ascii=False)
