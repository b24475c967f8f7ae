"""Full-size INT8 repository with random weights and front ends, for server benchmarks.

    python -m bench.models.full_size_served xlm-roberta-base-ViT-B-32 --work FOLDER

Parity of random weights cannot be checked: the manifest says so, and the model serves only to measure speed.
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
    """Return ``WORK/repository/VARIANT``, making what is missing: graphs, variant, front ends."""
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
    """Write a full-size INT8 repository with random weights."""
    typer.echo(served_model(variant, work))


if __name__ == "__main__":
    typer.run(main)
