"""A full-size model of random weights in INT8 as a repository with front ends, for measuring servers.

    python -m bench.models.full_size_served xlm-roberta-base-ViT-B-32 --work FOLDER

Random weights have no parity to be held to: the manifest says so, and the model is good for speed alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.manifest import Engine, Precision

__all__ = ["served_model"]


def served_model(
    variant: str, work: Path, *, precision: Precision = Precision.INT8, engine: Engine = Engine.OPENVINO
) -> Path:
    """``WORK/repository/VARIANT``, made where it is missing: checkpoint, graphs, variant, front ends."""
    from bench.models.full_size import checkpoint_from_variant
    from export.checkpoint import towers_from_checkpoint
    from export.repository import repository_for_timing
    from export.variants import forms_for
    from runtime.manifest import manifest_path

    repository = work / "repository"
    if manifest_path(repository / variant).is_file():
        return repository / variant
    checkpoint = work / "checkpoints" / variant
    if not checkpoint.is_dir():
        checkpoint_from_variant(variant, checkpoint)
    (form,) = forms_for([precision], [engine], installed=[engine])
    return repository_for_timing(towers_from_checkpoint(checkpoint), repository, name=variant, form=form)


def main(
    variant: Annotated[str, typer.Argument(help="A published variant.")],
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint and the repository; some 4 GB.")],
) -> None:
    """Write a full-size INT8 repository of random weights."""
    typer.echo(served_model(variant, work))


if __name__ == "__main__":
    typer.run(main)
