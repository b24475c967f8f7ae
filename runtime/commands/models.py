"""Commands that need only the runtime: ``inspect``, ``languages``, ``embed``, ``index`` and ``search``.

Environment variables are read here and nowhere else: ``BABELTOWER_ENGINE``, ``BABELTOWER_PRECISION``,
``BABELTOWER_THREADS`` and ``BABELTOWER_CACHE`` stand in for the options of the same names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.commands.embed import embed
from runtime.commands.errors import ErrorReportingGroup
from runtime.commands.index import index, search
from runtime.commands.serve import serve

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
app.command()(serve)

Model = Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Verify a model's checksums and describe it."""
    from runtime.commands.summary import summary_from_model, text_from_summary

    summary = summary_from_model(model)
    typer.echo(_json(summary) if as_json else text_from_summary(summary))


@app.command()
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
        typer.echo(_json([{"flores": row.flores, "bcp47": row.bcp47, "name": row.name} for row in found]))
    else:
        typer.echo(text_from_languages(found))


@app.command()
def rollout(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            metavar="REPOSITORY/NAME|VERSION",
            help="Model with the new version, or the number of a version served before.",
        ),
    ],
    url: Annotated[str, typer.Option(help="grpc://HOST:PORT of the server of the repository.")],
    variant: Annotated[
        str | None, typer.Option(help="Variant of the new model; default: the only one.")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM file of CA certificates to verify the server.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="BABELTOWER_TOKEN", help="Bearer token sent with every request.")
    ] = None,
) -> None:
    """Switch a served model to a new version under traffic, if its answers to the probes are correct.

    The new version is loaded beside the old one and probed; if a probe fails, everything is restored and the
    exit code is 1.
    """
    from runtime.remote import Connection
    from runtime.rollout import roll_out

    connection = Connection(token=token, ca_file=ca_file)
    done = roll_out(
        model,
        int(to) if to.isdecimal() else to,
        url=url,
        variant=variant,
        connection=connection,
        say=lambda step: typer.echo(step, err=True),
    )
    language, mean = min(done.after.languages.items(), key=lambda item: item[1])
    typer.echo(
        f"{done.model.name} serves version {done.version}: {len(done.after.languages)} languages pass, the "
        f"worst, {language}, at a mean cosine of {mean:.6f}; images at {done.after.images:.6f}"
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
