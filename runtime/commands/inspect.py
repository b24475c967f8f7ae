"""``babeltower inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from runtime.commands.options import AsJson, Model, json_text

__all__ = ["inspect"]


def inspect(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Show the dropped tokens that this text needs, if any; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a model's checksums and describe it."""
    from runtime.commands.summary import dropped_tokens, summary_from_model, text_from_summary

    summary = summary_from_model(model)
    if text:
        summary["dropped_tokens"] = dropped_tokens(model, text)
    typer.echo(json_text(summary) if as_json else text_from_summary(summary))
