"""Options and output that several commands share."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.remote.options import Connection

__all__ = [
    "AsJson",
    "Model",
    "ca_file_option",
    "cache_option",
    "connection_from_files",
    "connection_to_model",
    "device_option",
    "json_text",
    "plain_json",
    "token_file_option",
]

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


def device_option(panel: str, where: str = "", *, in_environment: bool = True) -> Any:
    """Return the option ``--device``, for commands that open a model in process.

    Args:
        where: Case in which the option applies, for the help; it always does by default.
        in_environment: Read ``BABELTOWER_DEVICE`` too; not where the option is refused in some cases.
    """
    return typer.Option(
        metavar="cpu|cuda[:N]",
        envvar="BABELTOWER_DEVICE" if in_environment else None,
        rich_help_panel=panel,
        help=f"{where}{'where' if where else 'Where'} the towers run; default: the processor, or the first "
        "GPU for an engine that needs one.",
    )


def token_file_option(panel: str, whose: str) -> Any:
    """Return an option for a file that holds a bearer token."""
    return typer.Option(
        metavar="FILE",
        rich_help_panel=panel,
        help=f"File with the bearer token {whose}.",
    )


def ca_file_option(panel: str) -> Any:
    """Return the option ``--ca-file``, for commands that connect to a server."""
    return typer.Option(
        metavar="FILE",
        rich_help_panel=panel,
        help="CA certificates (PEM) to verify the server's; default: the system's.",
    )


def connection_from_files(token_file: Path | None, ca_file: Path | None) -> Connection:
    """Return the connection to a server that a command was given.

    Raises:
        InputError: a file cannot be read.
    """
    from runtime.remote.options import Connection, token_from_file

    token = None if token_file is None else token_from_file(token_file)
    return Connection(token=token, ca_file=ca_file)


def connection_to_model(model: str, token_file: Path | None, ca_file: Path | None) -> Connection | None:
    """Return the connection for a model that is an address; ``None`` for a path.

    Raises:
        InputError: a file cannot be read, or the model is a path.
    """
    if "://" in model:
        return connection_from_files(token_file, ca_file)
    if token_file is not None or ca_file is not None:
        raise InputError(f"--token-file and --ca-file are for a server's address; {model} is a path.")
    return None


def plain_json(value: Any) -> Any:
    """Return a value of any Arrow type as JSON has it.

    Dates and times are ISO 8601, durations seconds, decimals strings (they are exact), bytes base64; a number
    that is not finite is null, and a map a list of pairs.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(name): plain_json(one) for name, one in value.items()}
        case list() | tuple():
            return [plain_json(one) for one in value]
    return str(value)


def json_text(value: Any) -> str:
    """JSON as commands print it: indented, with every script readable."""
    return json.dumps(value, indent=2, ensure_ascii=False)
