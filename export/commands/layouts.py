"""``babeltower export --layout``: the model folder of another server, or a web page."""

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
    from export.layouts.layout import Layout
    from export.layouts.publish import LaidOut
    from export.repository import ExportOptions

__all__ = ["export_layout", "layout_from_options", "require_engine", "summary_of_layout"]


def layout_from_options(
    name: LayoutName,
    *,
    gallery: Path | None,
    pictures: Path | None,
    id_column: str | None,
    npm_packages: Path | None,
) -> Layout | None:
    """Return a layout with the settings of the command line; None for a Triton repository.

    Raises:
        ExportError: a setting does not apply to the layout, or needs another.
    """
    given = {
        "--gallery": gallery,
        "--pictures": pictures,
        "--id-column": id_column,
        "--npm-packages": npm_packages,
    }
    named = [option for option, value in given.items() if value is not None]
    if named and name is not LayoutName.WEB:
        raise ExportError(f"{named[0]} is a setting of a web page; add --layout web, or leave it out.")
    if name is LayoutName.TRITON:
        return None
    if gallery is None and (pictures is not None or id_column is not None):
        raise ExportError("--pictures and --id-column are of a gallery of vectors; add --gallery VECTORS.")

    if name is LayoutName.WEB:
        from export.layouts.web.gallery import GallerySource
        from export.layouts.web.layout import WebOptions, web_layout

        source = None if gallery is None else GallerySource(gallery, pictures, id_column)
        return web_layout(WebOptions(source, npm_packages))
    from export.layouts.registry import LAYOUTS

    return LAYOUTS[name]


def require_engine(layout: Layout, engines: list[Engine] | None) -> list[Engine]:
    """Return the engine of a layout's server as the only one.

    Raises:
        ExportError: another engine was asked for.
    """
    own = layout.engine
    if set(engines or [own]) != {own}:
        raise ExportError(
            f"{layout.name.value} runs graphs with {own.value}; leave --engine out, or pass --engine "
            f"{own.value}."
        )
    return [own]


def export_layout(
    checkpoint: str,
    folder: Path,
    layout: Layout,
    *,
    name: str | None,
    base: str | None,
    image_tower: str | None,
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
            image_tower=image_tower,
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
        f"{record['precision']:<12} {size / 1e6:,.1f} MB on disk in {len(record['files']):,} files",
    ]
    if done.parity is not None:
        lines += parity_lines(done.parity.report)
    if done.parity is not None and (done.parity.other_texts or done.parity.n_other_images):
        lines.append(
            f"  own ways   {done.place.name}'s server cleans {len(done.parity.other_texts)} probe texts and "
            f"prepares {done.parity.n_other_images} probe images otherwise than the family's library"
        )
    lines += [f"note         {note}" for note in done.place.notes]
    lines.append(
        "seconds      " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in done.seconds.items())
    )
    return "\n".join(lines)
