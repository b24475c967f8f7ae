"""What a benchmark of one's own checkpoint, or of the samples by name, is asked to run."""

from __future__ import annotations

from pathlib import Path

import typer

from runtime.errors import DatasetError

__all__ = ["SAMPLES", "SAMPLE_REPOSITORY", "jobs_of", "numbered"]

SAMPLES = ("nllb-clip", "nllb-siglip-mrl", "capivara", "capivara-lora", "altclip")

_ROOT = Path(__file__).resolve().parents[1]

SAMPLE_REPOSITORY = _ROOT / "build" / "repository"
"""Where sample checkpoints are exported to."""


def jobs_of(models: list[str], checkpoint: str | None, model: str | None) -> list[tuple[str, str | None]]:
    """(checkpoint, ``REPOSITORY/NAME``) of every run; ``None`` for a sample, which is exported when needed.

    Raises:
        BadParameter: a checkpoint without its model, the reverse, or with names of samples.
        DatasetError: no sample has that name.
    """
    if (checkpoint is None) != (model is None) or (checkpoint and models):
        raise typer.BadParameter("Pass --checkpoint and --model together, or names of sample checkpoints.")
    if checkpoint:
        return [(checkpoint, model)]
    folder = _ROOT / "samples" / "checkpoints"
    found = {name: folder / name for name in SAMPLES if (folder / name).is_dir()}
    wanted = models or list(found)
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        raise DatasetError(
            f"No sample checkpoint {missing or folder}; there are {list(found)}. They lie in the source "
            "tree, not in the wheel: run from a checkout, or pass --checkpoint and --model."
        )
    return [(str(found[name]), None) for name in wanted]


def numbered(path: Path | None, model: str, *, n_jobs: int) -> Path | None:
    """The path, with the model's name before the suffix where several models are written."""
    if path is None or n_jobs == 1:
        return path
    return path.with_name(f"{path.stem}-{model}{path.suffix}")
