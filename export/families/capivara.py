"""CAPIVARA (arXiv 2310.13683): open_clip's XLM-R base + ViT-B/32, tuned for Portuguese.

Forms: an open_clip folder; a training checkpoint of open_clip (``epoch_latest.pt``, names under ``module.``)
or of the project's own Lightning code (``*.ckpt``, names under ``model.model.``).
"""

from __future__ import annotations

from pathlib import Path

from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.open_clip_checkpoint import checkpoint_from_folder, find_weights, text_model_type
from export.families.open_clip_towers import towers_from_open_clip
from export.families.published import LICENCES
from export.towers import Towers
from export.weights.tensors import weight_files

__all__ = ["FAMILY"]

ARCHITECTURE = "xlm-roberta-base-ViT-B-32"


def claims(path: Path) -> bool:
    """Check for an open_clip folder with an XLM-R text model, or bare weights as saved by CAPIVARA's code."""
    folder = folder_of(path)
    if (folder / "open_clip_config.json").is_file():
        return text_model_type(folder) == "xlm-roberta"
    return not (folder / "config.json").is_file() and (path.is_file() or bool(weight_files(folder)))


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: see ``checkpoint_from_folder``.
    """
    folder = folder_of(path)
    checkpoint = checkpoint_from_folder(
        folder, architecture=ARCHITECTURE, weights=file_of(path) or find_weights(folder)
    )
    return towers_from_open_clip(checkpoint, family="capivara", options=options)


FAMILY = Family(
    name="capivara",
    claims=claims,
    load=load,
    licence=LICENCES["capivara"],
    forms="open_clip folder whose text model is XLM-R; bare weights of its training code (*.ckpt, *.pt)",
)
