"""Error reporting of every command: a deliberate error is one message on stderr and exit code 1.

Warnings of the library are printed to stderr too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from runtime.errors import BabeltowerError

__all__ = ["ErrorReportingCommand", "ErrorReportingGroup", "cache_option"]


class _Printed(logging.Handler):
    """Logging handler that prints records the way commands print errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record to stderr."""
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def cache_option(panel: str) -> Any:
    """Return the option ``--cache``, for commands that open a model in process: folder of passed checks."""
    return typer.Option(
        metavar="FOLDER",
        envvar="BABELTOWER_CACHE",
        rich_help_panel=panel,
        help="Folder that records passed opening checks; default: in the user's cache.",
    )


@contextmanager
def _errors_reported() -> Iterator[None]:
    logger, handler = logging.getLogger("babeltower"), _Printed(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    except BabeltowerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        logger.removeHandler(handler)


class ErrorReportingGroup(TyperGroup):
    """Command group that reports errors."""

    def invoke(self, ctx: Any) -> Any:
        """Run the named command."""
        with _errors_reported():
            return super().invoke(ctx)


class ErrorReportingCommand(TyperCommand):
    """Single command that reports errors; Typer makes no group of one command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _errors_reported():
            return super().invoke(ctx)
