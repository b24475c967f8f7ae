"""Language codes in any common spelling, resolved to FLORES-200.

The table is ``languages.csv``: one row per FLORES code, with its canonical BCP-47 tag, CLDR file, English
name and further spellings of the same language.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from runtime.errors import LanguageError
from runtime.preprocessing.language_tags import (
    NO_LANGUAGE,
    Tag,
    canonical_language,
    forms_of_tag,
    is_assigned,
    likely_script,
    macrolanguage_of,
    members_of_macrolanguage,
    official_languages,
    readable_script,
    tag_from_code,
    unregistered_subtag,
)

__all__ = [
    "Language",
    "code_among",
    "english_name",
    "flores_from_code",
    "languages",
    "languages_from_codes",
    "spoken_language",
]

_N_CLOSE = 4
_SHORTEST_NAME = 4


@dataclass(frozen=True, slots=True)
class Language:
    """One row of the table; ``cldr`` is empty if CLDR has no data."""

    flores: str
    bcp47: str
    cldr: str
    flores200: bool
    name: str
    aliases: tuple[str, ...]


@lru_cache(maxsize=1)
def languages() -> tuple[Language, ...]:
    """Return every known language, in table order."""
    text = files("runtime.preprocessing").joinpath("languages.csv").read_text(encoding="utf-8")
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
    """Return the rows of FLORES codes, in the given order.

    Raises:
        LanguageError: a code is not in the table.
    """
    rows = {language.flores: language for language in languages()}
    return tuple(rows.get(code) or rows[flores_from_code(code)] for code in codes)


def english_name(flores: str) -> str:
    """Return a language's English name, or the code itself if the table has none."""
    return next((row.name for row in languages() if row.flores == flores), flores)


@lru_cache(maxsize=4096)
def flores_from_code(code: str) -> str:
    """Resolve a language code: ``pt``, ``pt-BR``, ``por-Latn``, ``pt_BR.UTF-8``, ``POR_latn`` → ``por_Latn``.

    BCP-47 tags, POSIX and Java locale names, ISO 639 codes of two and three letters and FLORES codes are
    accepted, in any case and with ``-`` or ``_``. Spellings listed in the table take precedence. Otherwise
    CLDR determines the language (``zho``, ``iw``, ``zh-cmn``) and the script: a region matters if CLDR's
    likely subtags say so (``sr-ME`` → ``srp_Latn``), and is ignored if not (``pt-MZ`` is ``pt``). Registered
    variants and extensions are ignored.

    Raises:
        LanguageError: the table does not have the language, or not in that script, or a region or variant is
            not registered; the message lists the closest rows.

    Source:
        FLORES-200 codes; BCP-47 (RFC 5646); aliases and likely subtags of CLDR (UTS #35).
    """
    spelled = _spellings().get(_key(code)) if code.isascii() else None
    if spelled is not None:
        return spelled
    tag = tag_from_code(code)
    found = _row_of_tag(tag) if tag and not _unregistered(tag) else None
    if found is None:
        raise LanguageError(_refusal(code, tag))
    return found


def _unregistered(tag: Tag) -> str | None:
    """Describe a subtag that is neither registered nor in a spelling of the table."""
    listed = [one for one in tag.variants if (tag.language, one) in _index().qualified]
    return unregistered_subtag(
        dataclasses.replace(tag, variants=tuple(one for one in tag.variants if one not in listed))
    )


def code_among(code: str, known: Collection[str]) -> str | None:
    """Resolve a code to one of ``known``: the code itself or its FLORES code; ``None`` if there is none."""
    if code in known:
        return code
    try:
        flores = flores_from_code(code)
    except LanguageError:
        return None
    return flores if flores in known else None


def spoken_language(code: str, known: Collection[str]) -> str:
    """Resolve a code to one of a tower's ``known`` codes.

    Raises:
        LanguageError: it is unknown, or not supported by the tower; the message lists the closest that are.
    """
    found = code_among(code, known)
    if found is None:
        flores = flores_from_code(code)
        close = _close_to_row(flores, known)
        raise LanguageError(
            f"This text tower does not support {english_name(flores)} ({flores}){_listed(close)}; it "
            f"supports {len(known)} languages. `babeltower languages REPOSITORY/NAME` lists them."
        )
    return found


def _close_to_row(flores: str, known: Collection[str]) -> tuple[str, ...]:
    (row,) = languages_from_codes([flores])
    return _kin(Tag(_language(row.bcp47), flores[4:]), frozenset(known))


def _listed(close: Sequence[str]) -> str:
    return f" (closest: {', '.join(close[:_N_CLOSE])})" if close else ""


def _key(code: str) -> str:
    return code.strip().replace("_", "-").casefold()


@lru_cache(maxsize=1)
def _spellings() -> dict[str, str]:
    return {
        _key(spelling): row.flores
        for row in languages()
        for spelling in (*row.aliases, row.bcp47, row.flores)
    }


@dataclass(frozen=True, slots=True)
class _Index:
    """Index of rows by parts of their spellings.

    Attributes:
        bare: Language → row with a spelling of it without a script.
        qualified: Language and region or variant → row, such as ``fa`` and ``AF``.
        scripts: Language, as spelled and as in CLDR → script → row.
    """

    bare: dict[str, str]
    qualified: dict[tuple[str, str], str]
    scripts: dict[str, dict[str, str]]


@lru_cache(maxsize=1)
def _index() -> _Index:
    index = _Index({}, {}, {})
    spelled = [(tag, row.flores) for row in languages() for tag in _tags_of_row(row)]
    for tag, flores in spelled:
        if tag.region and not tag.script:
            index.qualified[tag.language, tag.region] = flores
        index.qualified.update({(tag.language, variant): flores for variant in tag.variants})
        if not tag.region and not tag.variants:
            index.scripts.setdefault(tag.language, {}).setdefault(tag.script or flores[4:], flores)
            if not tag.script:
                index.bare[tag.language] = flores
    for tag, flores in spelled:
        *_, (form, _) = forms_of_tag(tag)
        if not form.region and not tag.variants:
            index.scripts.setdefault(form.language, {}).setdefault(form.script or flores[4:], flores)
    return index


def _tags_of_row(row: Language) -> Iterator[Tag]:
    for spelling in (row.flores, row.bcp47, *row.aliases):
        tag = tag_from_code(spelling)
        if tag is not None:  # zh-CHS and the like are not tags; _spellings has them
            yield tag


def _row_of_tag(tag: Tag) -> str | None:
    known = tag.language in _index().scripts
    for form, of_macrolanguage in forms_of_tag(tag):
        found = None if known and of_macrolanguage else _row_of_form(form)
        if found is not None:
            return found
    return None


def _row_of_form(tag: Tag) -> str | None:
    index = _index()
    scripts = index.scripts.get(tag.language, {})
    for qualifier in (*tag.variants, tag.region):
        found = index.qualified.get((tag.language, qualifier))
        if found and (not tag.script or readable_script(tag.script, {found[4:]: found})):
            return found
    usual = likely_script(tag.language)
    wanted = tag.script or likely_script(tag.language, tag.region)
    if not tag.script and wanted == usual and tag.language in index.bare:
        return index.bare[tag.language]
    script = readable_script(wanted, scripts)
    return None if script is None else scripts[script]


def _refusal(code: str, tag: Tag | None) -> str:
    unregistered = _unregistered(tag) if tag else None
    if tag is not None:
        tag, _ = next(forms_of_tag(tag))
    close = _listed(_close_to_code(_key(code), tag))
    reason = f": {unregistered}" if unregistered and tag and _rows_of_language(tag.language) else _reason(tag)
    return (
        f"Language {code!r} is unknown{reason}{close}. Pass a FLORES-200 code or a BCP-47 tag; "
        "`babeltower languages` lists them."
    )


def _reason(tag: Tag | None) -> str:
    if tag is None:
        return ": it is neither a BCP-47 tag nor a locale name"
    if tag.language in NO_LANGUAGE:
        return ": it names no language"
    if not _rows_of_language(tag.language):
        return ""
    if tag.script:
        return f" in the script {tag.script}"
    *_, (form, _) = forms_of_tag(tag)
    script = form.script or likely_script(form.language, form.region)
    return f" in the script {script}, CLDR's likely one for this code"


def _close_to_code(key: str, tag: Tag | None) -> tuple[str, ...]:
    """Return rows of the same language, else its macrolanguage or country, else of similar spelling."""
    language = tag.language if tag else re.split("[^a-z]", key)[0]
    if language in NO_LANGUAGE:
        return ()
    found = _kin(tag or Tag(language), frozenset(row.flores for row in languages()))
    if not found:
        found = tuple(flores_from_code(one) for one in official_languages(language))
    if not found and not is_assigned(language):
        found = _spelled_alike(language, key)
    return found


def _kin(tag: Tag, known: frozenset[str]) -> tuple[str, ...]:
    """Return rows of a language, otherwise of its macrolanguage or its member languages."""
    macro = macrolanguage_of(tag.language)
    around = _rows_of_language(macro) if macro else ()
    same = [*_rows_of_language(tag.language), *(row for row in around if row[4:] == tag.script)]
    members = members_of_macrolanguage(macro or tag.language)
    family = [*around, *(row for member in members for row in _rows_of_language(member))]
    found = [row for row in same if row in known] or [row for row in family if row in known]
    return tuple(dict.fromkeys(found))


def _rows_of_language(language: str) -> tuple[str, ...]:
    """Return rows of a language and of its CLDR code, the row of its bare code first."""
    index = _index()
    found: list[str] = []
    for one in (language, canonical_language(language)):
        rows = tuple(index.scripts.get(one, {}).values())
        found += [index.bare[one]] if index.bare.get(one) in rows else []
        found += rows
    return tuple(dict.fromkeys(found))


def _spelled_alike(language: str, key: str) -> tuple[str, ...]:
    """Return rows with a similar English name, or whose code has the same letters in another order."""
    if len(language) < _SHORTEST_NAME:
        return tuple(row.flores for row in languages() if sorted(row.flores[:3]) == sorted(language))
    names: dict[str, list[str]] = {}
    for row in sorted(languages(), key=lambda row: len(_language(row.bcp47))):
        name = row.name.casefold().partition(" (")[0]
        for one in {name, name.split()[-1]}:
            names.setdefault(one, []).append(row.flores)
    written = key.partition(".")[0]
    same = [name for name in (written, language) if name in names][:1]
    close = same or difflib.get_close_matches(written, names, n=2, cutoff=0.75)
    return tuple(dict.fromkeys(flores for name in close for flores in names[name]))


def _language(bcp47: str) -> str:
    return bcp47.split("-")[0]
