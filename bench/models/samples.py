"""Checkout and sample checkpoints, and the choice between samples and a user's own checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from runtime.errors import DatasetError

__all__ = [
    "CHECKPOINTS",
    "ROOT",
    "SAMPLES",
    "SAMPLE_REPOSITORY",
    "jobs_of",
    "numbered",
    "sample_checkpoint",
    "sample_checkpoints",
]

SAMPLES = ("nllb-clip", "nllb-siglip-mrl", "capivara", "capivara-lora", "altclip")
"""Names of the sample checkpoints, in the order of every table."""

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout that benchmarks are run from."""

CHECKPOINTS = ROOT / "samples" / "checkpoints"

SAMPLE_REPOSITORY = ROOT / "build" / "repository"
"""Repository for exported sample checkpoints."""


def jobs_of(models: list[str], checkpoint: str | None, model: str | None) -> list[tuple[str, str | None]]:
    """Return (checkpoint, ``REPOSITORY/NAME``) of every run; ``None`` for a sample exported on demand.

    Raises:
        BadParameter: a checkpoint is given without its model, the reverse, or together with names of samples.
        DatasetError: no sample has that name.
    """
    if (checkpoint is None) != (model is None) or (checkpoint and models):
        raise typer.BadParameter("Pass --checkpoint and --model together, or names of sample checkpoints.")
    if checkpoint:
        return [(checkpoint, model)]
    return [(str(path), None) for path in sample_checkpoints(models)]


def sample_checkpoints(names: Sequence[str] = ()) -> list[Path]:
    """Return the folders of the named samples, all by default.

    Raises:
        DatasetError: no sample has that name.
    """
    return [sample_checkpoint(name) for name in names or SAMPLES]


def sample_checkpoint(name: str) -> Path:
    """Return the folder of one sample.

    Raises:
        DatasetError: no sample has that name.
    """
    found = [known for known in SAMPLES if (CHECKPOINTS / known).is_dir()]
    if name not in found:
        raise DatasetError(
            f"No sample checkpoint {name!r}; there are {found}. They are in the checkout, not in the wheel. "
            "Name one of them, or pass a model of your own."
        )
    return CHECKPOINTS / name


def numbered(path: Path | None, model: str, *, n_jobs: int) -> Path | None:
    """Return the path, with the model's name before the suffix if several models are written."""
    if path is None or n_jobs == 1:
        return path
    return path.with_name(f"{path.stem}-{model}{path.suffix}")
