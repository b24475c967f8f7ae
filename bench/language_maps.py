"""From a data set's own language codes to FLORES-200, by one of two maps.

``PAPER`` repeats the choices of NLLB-CLIP's published evaluation (``test/lang_map.py`` of its repository),
and is needed to repeat its figures. ``RIGHT`` names the language that the text is in. They differ in:

======  ===========  ===========  =====================================================================
code    PAPER        RIGHT        why
======  ===========  ===========  =====================================================================
zh      zho_Hant     zho_Hans     XTD10 and Crossmodal-3600 write simplified characters
cn      zho_Hant     zho_Hans     COCO-CN's own sentences are in simplified characters
zhm     yue_Hant     zho_Hans     human translations into simplified Mandarin, not Cantonese
no      nno_Latn     nob_Latn     Crossmodal-3600's Norwegian is Bokmål
======  ===========  ===========  =====================================================================

``quz`` (Cusco Quechua) goes to ``quy_Latn`` (Ayacucho Quechua) in both: FLORES-200 has no nearer language.
Codes that are FLORES-200 already, as in XTD200 and Flickr30k-200, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from runtime.errors import DatasetError, LanguageError
from runtime.languages import flores_from_code, languages

__all__ = ["LanguageMap", "babel_language", "flores_code"]

_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")

_SHARED: Mapping[str, str] = MappingProxyType(
    {
        "ar": "arb_Arab",
        "bn": "ben_Beng",
        "cs": "ces_Latn",
        "da": "dan_Latn",
        "de": "deu_Latn",
        "el": "ell_Grek",
        "en": "eng_Latn",
        "es": "spa_Latn",
        "fa": "pes_Arab",
        "fi": "fin_Latn",
        "fil": "tgl_Latn",
        "fr": "fra_Latn",
        "he": "heb_Hebr",
        "hi": "hin_Deva",
        "hr": "hrv_Latn",
        "hu": "hun_Latn",
        "id": "ind_Latn",
        "it": "ita_Latn",
        "ja": "jpn_Jpan",
        "jp": "jpn_Jpan",
        "ko": "kor_Hang",
        "mi": "mri_Latn",
        "nl": "nld_Latn",
        "pl": "pol_Latn",
        "pt": "por_Latn",
        "quz": "quy_Latn",
        "ro": "ron_Latn",
        "ru": "rus_Cyrl",
        "sv": "swe_Latn",
        "sw": "swh_Latn",
        "te": "tel_Telu",
        "th": "tha_Thai",
        "tr": "tur_Latn",
        "uk": "ukr_Cyrl",
        "vi": "vie_Latn",
        "xh": "xho_Latn",
    }
)


class LanguageMap(str, Enum):
    """Which map was used; named in every record and report."""

    PAPER = "paper"
    RIGHT = "right"


_OWN: Mapping[LanguageMap, Mapping[str, str]] = MappingProxyType(
    {
        LanguageMap.PAPER: {"zh": "zho_Hant", "cn": "zho_Hant", "zhm": "yue_Hant", "no": "nno_Latn"},
        LanguageMap.RIGHT: {"zh": "zho_Hans", "cn": "zho_Hans", "zhm": "zho_Hans", "no": "nob_Latn"},
    }
)


def flores_code(code: str, language_map: LanguageMap) -> str:
    """The FLORES-200 code of a data set's language code.

    Raises:
        DatasetError: the code is in neither map and is no FLORES-200 code.
    """
    if _FLORES.fullmatch(code):
        return code
    known = {**_SHARED, **_OWN[language_map]}
    if code not in known:
        raise DatasetError(
            f"Language code {code!r} is no FLORES-200 code, and the {language_map.value} language map does "
            f"not list it; it lists {sorted(known)}. Add it to bench/language_maps.py."
        )
    return known[code]


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
    """The FLORES-200 code of one of Babel-ImageNet's language codes (``DE``, ``ZH_YUE``).

    ``PAPER`` repeats the choices of its published evaluation (``benchmark/models/nllb_clip.py``), which gives
    English's token to a language that its table lacks.

    Returns:
        ``None`` where the language has no code and ``RIGHT`` is asked; a tower that takes no language reads
        it all the same.
    """
    try:
        found = flores_from_code(code)
    except LanguageError:
        found = None
    if language_map is LanguageMap.RIGHT:
        return found
    spoken = found if any(row.flores == found and row.flores200 for row in languages()) else "eng_Latn"
    return _BABEL_PAPER.get(code, spoken)
