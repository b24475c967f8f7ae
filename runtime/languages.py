"""Language codes: every code a caller may write, resolved to FLORES-200.

The table is ``languages.csv``: one row a FLORES code, with its canonical BCP-47 tag, its CLDR file, its
English name and the further spellings that mean the same language.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from runtime.errors import LanguageError

__all__ = ["Language", "english_name", "flores_from_code", "languages", "languages_from_codes"]


@dataclass(frozen=True, slots=True)
class Language:
    """One row of the table; ``cldr`` is empty where CLDR has no data."""

    flores: str
    bcp47: str
    cldr: str
    flores200: bool
    name: str
    aliases: tuple[str, ...]


@lru_cache(maxsize=1)
def languages() -> tuple[Language, ...]:
    """Every known language, in the table's order."""
    text = files("runtime").joinpath("languages.csv").read_text(encoding="utf-8")
    return tuple(
        Language(
            flores=row["flores"],
            bcp47=row["bcp47"],
            cldr=row["cldr"],
            flores200=row["flores200"] == "true",
            name=row["name"],
            aliases=tuple(row["aliases"].split()),
        )
        for row in csv.DictReader(text.splitlines())
    )


def languages_from_codes(codes: Iterable[str]) -> tuple[Language, ...]:
    """The rows of some FLORES codes, in the given order.

    Raises:
        LanguageError: a code is not a FLORES code of the table.
    """
    rows = {language.flores: language for language in languages()}
    return tuple(rows.get(code) or rows[flores_from_code(code)] for code in codes)


def english_name(flores: str) -> str:
    """A language's English name, or the code itself where the table has none."""
    return next((row.name for row in languages() if row.flores == flores), flores)


@lru_cache(maxsize=4096)
def flores_from_code(code: str) -> str:
    """Resolve a language code: ``pt``, ``pt-BR``, ``por-Latn`` and ``POR_latn`` are all ``por_Latn``.

    A region that the table does not list is left out of account (``pt-MZ`` is ``pt``); a script never is.

    Raises:
        LanguageError: the code is unknown; the message names the closest ones.

    Source:
        FLORES-200 codes, BCP-47 tags (RFC 5646) and lookup without region (RFC 4647, 3.4).
    """
    key = _key(code)
    found = _codes().get(key) or _codes().get(_without_region(key))
    if found is None:
        raise LanguageError(
            f"Language {code!r} is unknown{_close_matches(key)}. Pass a FLORES-200 or BCP-47 code, such as "
            "'por_Latn' or 'pt-BR'; `babeltower languages` lists them."
        )
    return found


def _key(code: str) -> str:
    return code.strip().replace("_", "-").casefold()


@lru_cache(maxsize=1)
def _codes() -> dict[str, str]:
    """Every spelling → FLORES code; what a row spells out itself wins over what is derived."""
    exact = {
        _key(spelling): language.flores
        for language in languages()
        for spelling in (*language.aliases, language.bcp47, language.flores)
    }
    derived: dict[str, set[str]] = {}
    for language in languages():
        iso639_3, script = language.flores.split("_")
        for spelling in (iso639_3, f"{language.bcp47.split('-')[0]}-{script}"):
            derived.setdefault(_key(spelling), set()).add(language.flores)
    unambiguous = {key: next(iter(found)) for key, found in derived.items() if len(found) == 1}
    return unambiguous | exact


def _without_region(key: str) -> str:
    return "-".join(part for i, part in enumerate(key.split("-")) if i == 0 or not _is_region(part))


def _is_region(subtag: str) -> bool:
    return (len(subtag) == 2 and subtag.isalpha()) or (len(subtag) == 3 and subtag.isdigit())


def _close_matches(key: str) -> str:
    names = {language.name.casefold(): language.flores for language in languages()}
    spellings = {**names, **_codes()}
    close = difflib.get_close_matches(key, spellings, n=6, cutoff=0.6)
    found = list(dict.fromkeys(spellings[match] for match in close))[:3]
    return f" (close to it: {', '.join(found)})" if found else ""
