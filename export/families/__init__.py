"""Registry of the supported model families; to add a family, add its description to ``FAMILIES``."""

from __future__ import annotations

from export.families.altclip import FAMILY as ALTCLIP
from export.families.capivara import FAMILY as CAPIVARA
from export.families.family import Family, LoadOptions
from export.families.m_clip import FAMILY as M_CLIP
from export.families.metaclip2 import FAMILY as METACLIP2
from export.families.nllb_clip import FAMILY as NLLB_CLIP
from export.families.siglip2 import FAMILY as SIGLIP2
from export.families.xlm_roberta_clip import FAMILY as XLM_ROBERTA_CLIP

__all__ = ["FAMILIES", "Family", "LoadOptions"]

FAMILIES: tuple[Family, ...] = (NLLB_CLIP, XLM_ROBERTA_CLIP, CAPIVARA, ALTCLIP, M_CLIP, SIGLIP2, METACLIP2)
