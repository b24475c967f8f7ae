"""``babeltower status``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from runtime.commands.options import AsJson, json_text

__all__ = ["status"]


def status(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Output folder or URL of an embedding run.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show how far an embedding run is: parts, rows, rates, bad rows by class, and its workers."""
    from runtime.corpus.folder.inspection import status_of_folder
    from runtime.corpus.stores import store_from_location

    found = status_of_folder(store_from_location(folder))
    typer.echo(json_text(asdict(found)) if as_json else _text(found))


def _text(status: Any) -> str:
    of = "" if status.n_parts is None else f" of {status.n_parts:,}"
    state = "finished" if status.is_finished else "not finished; the same babeltower embed command resumes it"
    lines = [
        f"{status.location}: {state}",
        f"model       {status.model}, {status.engine}, {status.modality}s",
        f"parts       {status.parts_done:,}{of} done, {status.parts_held:,} under way"
        + (f", {status.parts_lost:,} lost" if status.parts_lost else ""),
        f"rows        {status.rows:,}, {status.n_bytes / 1e6:,.1f} MB",
        f"bad         {status.bad:,}"
        + (f": {', '.join(f'{kind} {n:,}' for kind, n in status.bad_kinds.items())}" if status.bad else ""),
    ]
    if status.rows_per_second is not None and not status.is_finished:
        left = "" if status.seconds_left is None else f", {status.seconds_left:,.0f} s left"
        lines.append(f"rate        {status.rows_per_second:,.1f} rows/s of all workers{left}")
    if status.computations > 1:
        lines.append(f"note        {status.computations} different computations, as accepted")
    for worker in status.workers:
        held = f"parts {', '.join(map(str, worker.parts[:8]))}" if worker.parts else "no part"
        lines.append(f"worker      {worker.name} on {worker.host}, process {worker.process}: {held}")
    return "\n".join(lines)
