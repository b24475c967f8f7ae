"""``babeltower inspect``."""

from __future__ import annotations

import typer

from runtime.commands.options import AsJson, Model, json_text

__all__ = ["inspect"]


def inspect(model: Model, as_json: AsJson = False) -> None:
    """Verify a model's checksums and describe it."""
    from runtime.commands.summary import summary_from_model, text_from_summary

    summary = summary_from_model(model)
    typer.echo(json_text(summary) if as_json else text_from_summary(summary))
