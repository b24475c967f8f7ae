"""``babeltower export --layout``: the model folder of another server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from export.commands.parity_lines import parity_lines
from export.layouts.names import LayoutName
from runtime.errors import ExportError
from runtime.manifest import Engine

if TYPE_CHECKING:
    from export.layouts.publish import LaidOut
    from export.repository import ExportOptions

__all__ = ["export_layout", "require_engine", "summary_of_layout"]


def require_engine(layout: LayoutName, engines: list[Engine] | None) -> list[Engine]:
    """Return the engine of a layout's server as the only one.

    Raises:
        ExportError: another engine was asked for.
    """
    from export.layouts.registry import LAYOUTS

    own = LAYOUTS[layout].engine
    if set(engines or [own]) != {own}:
        raise ExportError(
            f"{layout.value} runs graphs with {own.value}; leave --engine out, or pass --engine {own.value}."
        )
    return [own]


def export_layout(
    checkpoint: str,
    folder: Path,
    layout: LayoutName,
    *,
    name: str | None,
    base: str | None,
    context_length: int | None,
    options: ExportOptions,
    as_json: bool,
) -> None:
    """Export a checkpoint to a server's model folder, and print the result."""
    from rich.console import Console

    from export.commands.progress import progress_bars
    from export.layouts.publish import layout_from_checkpoint

    with progress_bars(Console(stderr=True)) as progress:
        done = layout_from_checkpoint(
            checkpoint,
            folder,
            layout,
            name=name,
            base=base,
            context_length=context_length,
            options=options,
            progress=progress,
        )
    typer.echo(json.dumps(done.as_json(), ensure_ascii=False) if as_json else summary_of_layout(done))


def summary_of_layout(done: LaidOut) -> str:
    """Return the lines that are printed after an export."""
    record = done.record
    size = sum(file["size_bytes"] for file in record["files"])
    lines = [
        f"published    {done.folder}",
        f"model        {record['family']}, {record['architecture']}",
        f"name         {done.place.name}",
        f"vectors      {record['dim']} wide",
        f"fingerprint  {record['fingerprint']}",
        f"{record['precision']:<12} {size / 1e6:,.1f} MB on disk",
    ]
    if done.parity is not None:
        lines += parity_lines(done.parity.report)
        lines.append(
            f"  own ways   {done.place.name}'s server cleans {len(done.parity.other_texts)} probe texts and "
            f"prepares {done.parity.n_other_images} probe images otherwise than the family's library"
        )
    lines += [f"note         {note}" for note in done.place.notes]
    lines.append(
        "seconds      " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in done.seconds.items())
    )
    return "\n".join(lines)
