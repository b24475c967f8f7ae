"""Error reporting of every command: a deliberate error is one message on stderr and exit code 1.

So is a file that cannot be read or written, standard output included; an interruption is one line and exit
code 130. Warnings of the library are printed to stderr too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from runtime.errors import BabeltowerError
from runtime.extras import missing_package
from runtime.logs import LOGGER

__all__ = ["ErrorReportingCommand", "ErrorReportingGroup", "report_os_error", "signals_interrupt"]

_OWN_PACKAGES = ("runtime", "export", "bench", "triton_models", "samples", "babeltower")


class _Signalled(KeyboardInterrupt):
    """SIGTERM or SIGHUP, received by a command that ends on it as on Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: once, since what follows must not be cut short.

    A signal that was ignored before, as SIGHUP is by ``nohup``, stays ignored.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def interrupt(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _Signalled(number)

    former = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Printed(logging.Handler):
    """Logging handler that prints records the way commands print errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record to stderr."""
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def report_os_error(error: OSError) -> None:
    """Print one line on a file that cannot be read or written, or on standard output that cannot."""
    if _is_of_output(error):
        with Path(os.devnull).open("wb") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python fails once more at its end
        typer.echo(f"error: The output cannot be written: {error.strerror or error}.", err=True)
    else:
        typer.echo(f"error: {error}", err=True)


def _is_of_output(error: OSError) -> bool:
    """Check whether an error was raised while printing."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return error.filename is None and module.partition(".")[0] in ("click", "rich", "typer")


@contextlib.contextmanager
def _errors_reported(interrupted: Callable[[], str] = lambda: "interrupted") -> Iterator[None]:
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
        typer.echo(f"error: {missing_package(error, 'This command')}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of a pipe is gone: Click ends without a word
            raise
        report_os_error(error)
        raise typer.Exit(1) from None
    except UnicodeEncodeError as error:
        if "surrogates" not in error.reason:
            raise
        shown = error.object.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        typer.echo(f"error: The name or text {shown[:200]!r} is not UTF-8. Rename the file.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interruption:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once
        typer.echo(interrupted(), err=True)
        number = interruption.number if isinstance(interruption, _Signalled) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    finally:
        LOGGER.removeHandler(handler)


class ErrorReportingGroup(TyperGroup):
    """Command group that reports errors."""

    def interrupted(self, ctx: Any) -> str:
        """Return the line that is printed after Ctrl-C."""
        return "interrupted"

    def invoke(self, ctx: Any) -> Any:
        """Run the named command."""
        with _errors_reported(lambda: self.interrupted(ctx)):
            return super().invoke(ctx)


class ErrorReportingCommand(TyperCommand):
    """Single command that reports errors; Typer makes no group of one command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _errors_reported():
            return super().invoke(ctx)
