"""Commands that need only the runtime: ``inspect``, ``languages``, ``search`` and ``embed``.

Environment variables are read here and nowhere else: ``BABELTOWER_ENGINE``, ``BABELTOWER_PRECISION`` and
``BABELTOWER_THREADS`` stand in for the options of the same names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.backends import Engine
from runtime.commands import ErrorReportingGroup
from runtime.corpus.cli import embed
from runtime.manifest import Precision

__all__ = ["app"]


app = typer.Typer(
    cls=ErrorReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Use exported multilingual CLIP towers.",
)

app.command()(embed)

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


@app.command()
def search(
    model: Model,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES...", help="Image files, folders (searched recursively) or Parquet files."
        ),
    ],
    query: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")],
    language: Annotated[str | None, typer.Option(help="Language of TEXT: por_Latn, pt-BR, ...")] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Results to print.")] = 5,
    dim: Annotated[int | None, typer.Option(help="Width of the vectors; the full width by default.")] = None,
    engine: Annotated[Engine, typer.Option(envvar="BABELTOWER_ENGINE")] = Engine.ONNXRUNTIME,
    precision: Annotated[Precision, typer.Option(envvar="BABELTOWER_PRECISION")] = Precision.FP32,
    threads: Annotated[
        int | None, typer.Option(min=1, envvar="BABELTOWER_THREADS", help="Every physical core by default.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report images that cannot be decoded, and go on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the images that a text describes best."""
    from runtime.encoder import Encoder
    from runtime.gallery import search_images

    with Encoder.open(model, engine=engine, precision=precision, threads=threads) as encoder:
        found = search_images(encoder, images, query, language=language, k=k, dim=dim, skip_bad=skip_bad)
    for problem in found.skipped:
        typer.echo(f"skipped: {problem}", err=True)
    if as_json:
        typer.echo(_json([{"image": hit.id, "score": hit.score} for hit in found.hits]))
    else:
        typer.echo("\n".join(f"{hit.score:.4f}  {hit.id}" for hit in found.hits))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
