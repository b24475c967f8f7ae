"""Commands that need only the runtime: ``inspect``, ``languages``, ``embed``, ``index`` and ``search``.

Environment variables are read here and nowhere else: ``BABELTOWER_ENGINE``, ``BABELTOWER_PRECISION`` and
``BABELTOWER_THREADS`` stand in for the options of the same names.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from runtime.commands import ErrorReportingGroup
from runtime.corpus.cli import embed
from runtime.indexes.cli import index, search

__all__ = ["app"]


app = typer.Typer(
    cls=ErrorReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Use exported multilingual CLIP towers.",
)

app.command()(embed)
app.command()(index)
app.command()(search)

Model = Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Describe a model, after its files are compared with their checksums."""
    from runtime.summary import summary_from_model, text_from_summary

    summary = summary_from_model(model)
    typer.echo(_json(summary) if as_json else text_from_summary(summary))


@app.command()
def languages(
    model: Annotated[
        str | None, typer.Argument(metavar="[REPOSITORY/NAME]", help="List only this model's languages.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List language codes: FLORES-200, BCP-47 and the English name."""
    from runtime.summary import languages_of_model, text_from_languages

    found = languages_of_model(model)
    if as_json:
        typer.echo(_json([{"flores": row.flores, "bcp47": row.bcp47, "name": row.name} for row in found]))
    else:
        typer.echo(text_from_languages(found))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
