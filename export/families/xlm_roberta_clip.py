"""LAION's multilingual CLIP with XLM-R large: open_clip's ``xlm-roberta-large-ViT-H-14``.

Published as ``laion/CLIP-ViT-H-14-frozen-xlm-roberta-large-laion5B-s13B-b90k``. Pooling, projection,
tokenizer and preprocessing are those of every open_clip model with an XLM-R text tower; one with XLM-R base
is CAPIVARA's base.
"""

from __future__ import annotations

from pathlib import Path

from export.families.family import Family, LoadOptions, file_of, folder_of
from export.families.open_clip_checkpoint import checkpoint_from_folder, text_model_name, text_model_type
from export.families.open_clip_towers import towers_from_open_clip
from export.families.published import LICENCES
from export.towers import Towers

__all__ = ["FAMILY"]

_TEXT_MODEL = "xlm-roberta-large"


def claims(path: Path) -> bool:
    """Check for an open_clip folder whose text model is XLM-R large, by its hub name."""
    folder = folder_of(path)
    name = text_model_name(folder)
    return (
        name is not None
        and name.rpartition("/")[2] == _TEXT_MODEL
        and text_model_type(folder) == "xlm-roberta"
    )


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: see ``checkpoint_from_folder`` and ``towers_from_open_clip``.
    """
    checkpoint = checkpoint_from_folder(folder_of(path), weights=file_of(path))
    return towers_from_open_clip(checkpoint, family="xlm-roberta-clip", options=options)


FAMILY = Family(
    name="xlm-roberta-clip",
    claims=claims,
    load=load,
    licence=LICENCES["xlm-roberta-clip"],
    forms="open_clip folder whose text model is xlm-roberta-large (xlm-roberta-large-ViT-H-14)",
)
