"""Two maps from a data set's own language codes to FLORES-200.

``PAPER`` repeats the choices of NLLB-CLIP's published evaluation (``test/lang_map.py`` of its repository),
and is needed to reproduce its figures. ``RIGHT`` names the language that the text is in. They differ in:

======  ===========  ===========  =====================================================================
code    PAPER        RIGHT        why
======  ===========  ===========  =====================================================================
zh      zho_Hant     zho_Hans     XTD10 and Crossmodal-3600 write simplified characters
cn      zho_Hant     zho_Hans     COCO-CN's own sentences are in simplified characters
zhm     yue_Hant     zho_Hans     human translations into simplified Mandarin, not Cantonese
no      nno_Latn     nob_Latn     Crossmodal-3600's Norwegian is Bokmål
======  ===========  ===========  =====================================================================

``quz`` (Cusco Quechua) maps to ``quy_Latn`` (Ayacucho Quechua) in both: FLORES-200 has no closer language.
Codes that are already FLORES-200, as in XTD200 and Flickr30k-200, are kept; the runtime resolves the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from runtime.errors import DatasetError, LanguageError
from runtime.preprocessing.languages import flores_from_code, languages

__all__ = ["LanguageMap", "babel_language", "flores_code"]

_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


class LanguageMap(str, Enum):
    """Name of a language map; recorded in every record and report."""

    PAPER = "paper"
    RIGHT = "right"


_OWN: Mapping[LanguageMap, Mapping[str, str]] = MappingProxyType(
    {
        LanguageMap.PAPER: {
            "cn": "zho_Hant",
            "jp": "jpn_Jpan",
            "no": "nno_Latn",
            "zh": "zho_Hant",
            "zhm": "yue_Hant",
        },
        LanguageMap.RIGHT: {"cn": "zho_Hans", "jp": "jpn_Jpan", "zhm": "zho_Hans"},
    }
)
"""Codes that ``flores_from_code`` lacks, and for ``PAPER`` those that it resolves differently."""


def flores_code(code: str, language_map: LanguageMap) -> str:
    """Return the FLORES-200 code of a data set's language code.

    Raises:
        DatasetError: it is not a language code, and the map does not list it.
    """
    own = _OWN[language_map]
    if _FLORES.fullmatch(code) or code in own:
        return own.get(code, code)
    try:
        return flores_from_code(code)
    except LanguageError as error:
        raise DatasetError(
            f"Language code {code!r} is not a FLORES-200 code, and the {language_map.value} language map "
            f"does not list it; it lists {sorted(own)} beside the codes of the runtime. {error} Add the "
            "data set's own codes to bench/datasets/language_maps.py."
        ) from error


_BABEL_PAPER: Mapping[str, str] = MappingProxyType(
    {
        "ZH": "zho_Hant",
        "NO": "nno_Latn",
        "KU": "ckb_Arab",
        "KS": "kas_Deva",
        **dict.fromkeys(("AY", "DIN", "QU", "ZH_YUE"), "eng_Latn"),
    }
)


def babel_language(code: str, language_map: LanguageMap) -> str | None:
    """Return the FLORES-200 code of one of Babel-ImageNet's language codes (``DE``, ``ZH_YUE``).

    ``PAPER`` repeats the choices of its published evaluation (``benchmark/models/nllb_clip.py``), which uses
    English's token for languages that are missing from its table.

    Returns:
        ``None`` if the language has no code and the map is ``RIGHT``; towers without language tokens read it
            all the same.
    """
    try:
        found = flores_from_code(code)
    except LanguageError:
        found = None
    if language_map is LanguageMap.RIGHT:
        return found
    spoken = found if any(row.flores == found and row.flores200 for row in languages()) else "eng_Latn"
    return _BABEL_PAPER.get(code, spoken)
