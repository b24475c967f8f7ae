"""What the commands of this package share."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from runtime.errors import BabeltowerError

__all__ = ["ErrorReportingCommand"]


class ErrorReportingCommand(TyperCommand):
    """A lone command whose deliberate errors end in one message on stderr and exit code 1.

    ``runtime.cli`` has the same for a group; Typer makes no group of a single command.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with code 1, after a BabeltowerError was printed.
        """
        try:
            return super().invoke(ctx)
        except BabeltowerError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
