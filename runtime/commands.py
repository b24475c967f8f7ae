"""How every command of the project ends: a deliberate error is one message on stderr, and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from runtime.errors import BabeltowerError

__all__ = ["ErrorReportingCommand", "ErrorReportingGroup"]


@contextmanager
def _errors_reported() -> Iterator[None]:
    try:
        yield
    except BabeltowerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


class ErrorReportingGroup(TyperGroup):
    """Several commands under one name."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        with _errors_reported():
            return super().invoke(ctx)


class ErrorReportingCommand(TyperCommand):
    """A lone command; Typer makes no group of a single one."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _errors_reported():
            return super().invoke(ctx)
