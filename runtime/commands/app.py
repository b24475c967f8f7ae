"""``babeltower``: the table of its commands, each imported when it is run.

``babeltower --help`` imports none of them, and a command imports nothing that it does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from runtime.commands.reporting import ErrorReportingGroup, report_os_error, signals_interrupt

__all__ = ["COMMANDS", "app", "main"]

_EXPORT, _SERVE, _SEARCH, _LOOK = "Export a checkpoint", "Serve a repository", "Embed and search", "Look up"


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command before it is imported; ``module`` has a function of the command's name.

    ``resumes``: the same command, run again after an interruption, continues.
    """

    name: str
    module: str
    panel: str
    help: str
    resumes: bool = False


COMMANDS = (
    CommandEntry("export", "export.commands.export", _EXPORT, "Export a checkpoint, and check its parity."),
    CommandEntry("quantize", "export.commands.quantize", _EXPORT, "Export in INT8 within a limit on recall."),
    CommandEntry("frontends", "export.commands.frontends", _EXPORT, "Write front ends for texts and images."),
    CommandEntry("serve", "runtime.commands.serve", _SERVE, "Serve a repository with Triton."),
    CommandEntry("ready", "runtime.commands.ready", _SERVE, "Check that a server embeds its probes."),
    CommandEntry("tune", "export.commands.tune", _SERVE, "Search the fastest serving configuration."),
    CommandEntry("rollout", "runtime.commands.rollout", _SERVE, "Switch a served model to a new version."),
    CommandEntry(
        "embed", "runtime.commands.embed", _SEARCH, "Embed a corpus of texts or images.", resumes=True
    ),
    CommandEntry("index", "runtime.commands.index", _SEARCH, "Build a FAISS index over vectors."),
    CommandEntry("search", "runtime.commands.search", _SEARCH, "Find what a text describes best."),
    CommandEntry("inspect", "runtime.commands.inspect", _LOOK, "Describe a model and verify its files."),
    CommandEntry("engines", "runtime.commands.engines", _LOOK, "List what each engine can run here."),
    CommandEntry("languages", "runtime.commands.languages", _LOOK, "List languages and their codes."),
)
"""Every command, in the order of the help."""

_CHANGING = {"export", "quantize", "frontends", "tune", "rollout"}
"""Commands that change a repository: SIGTERM and SIGHUP end them as Ctrl-C does, with nothing half-done."""


class _DeferredCommand(TyperCommand):
    """A command as the help lists it."""

    def __init__(self, entry: CommandEntry) -> None:
        super().__init__(entry.name, help=entry.help, rich_help_panel=entry.panel)
        self.entry = entry

    def loaded(self) -> Any:
        """Import the command."""
        single = typer.Typer(add_completion=False)
        single.command(self.entry.name)(getattr(import_module(self.entry.module), self.entry.name))
        return typer.main.get_command(single)


class _DeferringGroup(ErrorReportingGroup):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = {entry.name: _DeferredCommand(entry) for entry in COMMANDS}

    def interrupted(self, ctx: Any) -> str:
        """Return the line that is printed after Ctrl-C."""
        resumes = any(entry.resumes for entry in COMMANDS if entry.name == ctx.invoked_subcommand)
        return "interrupted; run the same command again to resume" if resumes else "interrupted"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that the arguments name."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.invoked_subcommand = name  # before the import, which an interruption may stop
        if name in _CHANGING:
            ctx.with_resource(signals_interrupt())
        return name, command.loaded() if isinstance(command, _DeferredCommand) else command, rest


app = typer.Typer(cls=_DeferringGroup, no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"babeltower {metadata.version('babeltower')}")
        raise typer.Exit


@app.callback()
def _babeltower(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Export, serve and use multilingual CLIP towers."""


def main() -> None:
    """Run the ``babeltower`` command."""
    try:
        app(prog_name="babeltower")
    except OSError as error:  # of the help, which no command prints
        report_os_error(error)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Typer's own, while it reads the arguments
        raise
