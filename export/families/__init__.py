"""Registry of the supported model families; to add a family, add its description to ``FAMILIES``."""

from __future__ import annotations

from export.families.altclip import FAMILY as ALTCLIP
from export.families.capivara import FAMILY as CAPIVARA
from export.families.family import Family, LoadOptions
from export.families.nllb_clip import FAMILY as NLLB_CLIP

__all__ = ["FAMILIES", "Family", "LoadOptions"]

FAMILIES: tuple[Family, ...] = (NLLB_CLIP, CAPIVARA, ALTCLIP)
