"""``babeltower languages``."""

from __future__ import annotations

from typing import Annotated

import typer

from runtime.commands.options import AsJson, json_text

__all__ = ["languages"]


def languages(
    model: Annotated[
        str | None, typer.Argument(metavar="[REPOSITORY/NAME]", help="List only this model's languages.")
    ] = None,
    code: Annotated[
        list[str] | None, typer.Option(help="Only the language of this code; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List language codes: FLORES-200, BCP-47 and the English name."""
    from runtime.commands.summary import languages_of_codes, languages_of_model, text_from_languages

    found = languages_of_codes(code, model) if code else languages_of_model(model)
    if as_json:
        typer.echo(json_text([{"flores": row.flores, "bcp47": row.bcp47, "name": row.name} for row in found]))
    else:
        typer.echo(text_from_languages(found))
