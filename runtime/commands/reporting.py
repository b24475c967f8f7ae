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
from runtime.extras import missing_package
from runtime.logs import LOGGER

__all__ = ["ErrorReportingCommand", "ErrorReportingGroup"]

_OWN_PACKAGES = ("runtime", "export", "bench", "triton_models", "samples", "babeltower")


class _Printed(logging.Handler):
    """Logging handler that prints records the way commands print errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record to stderr."""
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


@contextmanager
def _errors_reported() -> Iterator[None]:
    handler = _Printed(logging.WARNING)
    LOGGER.addHandler(handler)
    try:
        yield
    except BabeltowerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] in _OWN_PACKAGES:
            raise
        typer.echo(f"error: {missing_package(error, 'this')}", err=True)
        raise typer.Exit(1) from None
    finally:
        LOGGER.removeHandler(handler)


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
