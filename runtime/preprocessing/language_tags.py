"""Language tags: parsing of all common spellings, and CLDR data about them.

BCP-47 (RFC 5646), CLDR and ICU locale identifiers (UTS #35), POSIX locale names, Java's ``Locale.toString``
and FLORES codes are all parsed into one ``Tag``. The data is ``language_tags.json``, which
``python -m samples.languages`` generates from CLDR and the IANA registry.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

__all__ = [
    "NO_LANGUAGE",
    "Tag",
    "canonical_language",
    "forms_of_tag",
    "is_assigned",
    "likely_script",
    "macrolanguage_of",
    "members_of_macrolanguage",
    "official_languages",
    "readable_script",
    "tag_from_code",
    "unregistered_subtag",
]

NO_LANGUAGE = frozenset({"", "art", "c", "mis", "mul", "posix", "root", "und", "zxx"})
"""Codes for no language, several languages or an unknown one; ``C`` and ``POSIX`` are neutral locales."""

_LANGUAGE = re.compile(r"[a-z]{2,8}")
_SCRIPT = re.compile(r"[a-z]{4}")
_REGION = re.compile(r"[a-z]{2}|[0-9]{3}")
_VARIANT = re.compile(r"[a-z0-9]{5,8}|[0-9][a-z0-9]{3}")
_EXTENSION = re.compile(r"([0-9a-wy-z](-[a-z0-9]{2,8})+-)*([0-9a-wy-z](-[a-z0-9]{2,8})+|x(-[a-z0-9]{1,8})+)")
_LOCALE = re.compile(r"(?P<tag>[^.@]+)(\.[\w-]+)?(@(?P<modifier>[^.@]+))?", re.ASCII)

_SCRIPT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "abegede": "Ethi",
        "adlam": "Adlm",
        "arabic": "Arab",
        "bengali": "Beng",
        "cyrillic": "Cyrl",
        "devanagari": "Deva",
        "greek": "Grek",
        "gurmukhi": "Guru",
        "hebrew": "Hebr",
        "ijekavianlatin": "Latn",  # KDE's and gettext's
        "iqtelif": "Latn",
        "latin": "Latn",
        "mongolian": "Mong",
        "olchiki": "Olck",
        "shaw": "Shaw",
        "tifinagh": "Tfng",
    }
)
"""Script names in POSIX modifiers and some data sets: ``sr@latin``, ``uzb-script_cyrillic``."""

_READ_AS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("Hani", "Hira", "Hrkt", "Kana"), "Jpan"),
        **dict.fromkeys(("Jamo", "Kore"), "Hang"),
        "Hanb": "Hant",
        "Aran": "Arab",
        "Cyrs": "Cyrl",
        "Geok": "Geor",
        **dict.fromkeys(("Latf", "Latg"), "Latn"),
        **dict.fromkeys(("Syre", "Syrj", "Syrn"), "Syrc"),
    }
)
"""Scripts that are a part, mixture or typographic variant of another, which replaces them."""

_VARIANTS_IN_USE = frozenset({"bokmal", "ijekavian", "nynorsk", "posix", "radical", "script", "traditional"})
"""Variants of POSIX locales and of data sets that IANA does not register."""

_MODIFIERS = frozenset({"boldquot", "cjknarrow", "cjkwide", "euro", "quot"})
"""POSIX modifiers that say nothing about the language: currency, quotation marks, width of characters."""

_GLOTTOCODE = re.compile(r"[a-z0-9]{4}[0-9]{4}")
"""Dialects of FLORES+: ``apc_Arab_nort3139``."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Subtags that identify a language and its script; missing ones are empty."""

    language: str
    script: str = ""
    region: str = ""
    variants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Facts:
    """Tables of the data file; their columns are described in ``samples.languages.facts_from_packages``."""

    aliases: Mapping[str, str]
    defaults: Mapping[str, str]
    regions: Mapping[str, str]
    likely: Mapping[str, str]
    extended: Mapping[str, str]
    macrolanguages: Mapping[str, str]
    countries: Mapping[str, str]
    assigned: Mapping[str, str]
    registered: Mapping[str, str]
    variants: Mapping[str, str]


@lru_cache(maxsize=1)
def _facts() -> _Facts:
    text = files("runtime.preprocessing").joinpath("language_tags.json").read_text(encoding="utf-8")
    tables = json.loads(text)
    return _Facts(**{field.name: tables[field.name] for field in dataclasses.fields(_Facts)})


def tag_from_code(code: str) -> Tag | None:
    """Parse a code in any spelling; a code without a language gets ``und``.

    Returns:
        ``None`` if the code is invalid in every standard.
    """
    code = code.strip()
    if not code:
        return Tag("und")
    found = _LOCALE.fullmatch(code.lower())
    if not code.isascii() or found is None:
        return None
    if found["tag"] in NO_LANGUAGE:
        return Tag("und")
    subtags = re.split("[-_]+" if "_" in code else "-", found["tag"])
    first = next((i for i, subtag in enumerate(subtags) if len(subtag) == 1 and (i or subtag == "x")), None)
    if first is not None and not _EXTENSION.fullmatch("-".join(subtags[first:])):
        return None
    tag = Tag("und") if first == 0 else _tag_from_subtags(subtags[:first])
    return _with_modifier(tag, found["modifier"] or "") if tag else None


def _tag_from_subtags(subtags: list[str]) -> Tag | None:
    """Parse subtags in RFC 5646 order, including registered legacy tags; a script name may come last."""
    rest = _without_legacy(subtags)
    named = [script for subtag in rest[1:] if (script := _named_script(subtag))]
    rest = [subtag for i, subtag in enumerate(rest) if i == 0 or not _named_script(subtag)]
    if not _LANGUAGE.fullmatch(rest[0]):
        return None
    language = rest.pop(0)
    while rest and len(rest[0]) == 3 and _is_language_of(rest[0], language):
        language = rest.pop(0)
    script = rest.pop(0).title() if rest and _SCRIPT.fullmatch(rest[0]) else next(iter(named), "")
    region = rest.pop(0).upper() if rest and _is_region(rest[0]) else ""
    if not all(_VARIANT.fullmatch(variant) for variant in rest):
        return None
    return Tag(language, "" if script == "Zzzz" else script, "" if region == "ZZ" else region, tuple(rest))


def unregistered_subtag(tag: Tag) -> str | None:
    """Describe the first region or variant of a tag that is not registered, or not for its language.

    Scripts need no such check, since a row must have the tag's script.

    Source:
        Regions of ISO 3166 and UN M49, and variants with their languages: IANA's registry. Private regions
        are registered (``XA`` to ``XZ``; mBART's codes have ``XX``).
    """
    facts = _facts()
    if tag.region and tag.region not in facts.regions and tag.region not in _registered_regions():
        return f"{tag.region!r} is not a region of ISO 3166 or UN M49"
    for variant in tag.variants:
        if variant in _VARIANTS_IN_USE or variant in _MODIFIERS or "=" in variant:
            continue
        if variant not in facts.variants and not _GLOTTOCODE.fullmatch(variant):
            return f"{variant!r} is neither a script nor a registered variant"
        registered_for = facts.variants.get(variant, "").split()
        if registered_for and not _is_one_of(tag.language, registered_for):
            return f"{variant!r} is a variant of other languages ({', '.join(registered_for)})"
    return None


@lru_cache(maxsize=1)
def _registered_regions() -> frozenset[str]:
    return frozenset(_facts().registered["regions"].split())


def _is_one_of(language: str, others: list[str]) -> bool:
    """Check whether a language, or its macrolanguage, is among others, however they are spelled."""
    names = {canonical_language(language), canonical_language(language, macro=False)}
    names.add(macrolanguage_of(language) or language)
    return not names.isdisjoint(name for one in others for name in (one, canonical_language(one)))


def _named_script(subtag: str) -> str | None:
    """Return the script named by a subtag: ``latin`` of some data sets, or ``#latn`` of Java."""
    java = subtag.startswith("#") and _SCRIPT.fullmatch(subtag[1:])
    return subtag[1:].title() if java else _SCRIPT_NAMES.get(subtag)


def _with_modifier(tag: Tag, modifier: str) -> Tag:
    """Add a POSIX modifier to a tag: as script if it is a script's code or name, otherwise as variant."""
    script = _SCRIPT_NAMES.get(modifier, modifier.title())
    if script in _scripts():
        return dataclasses.replace(tag, script=tag.script or script)
    return dataclasses.replace(tag, variants=(*tag.variants, modifier)) if modifier else tag


@lru_cache(maxsize=1)
def _scripts() -> frozenset[str]:
    likely = {script.split("-")[0] for script in _facts().likely.values()}
    return frozenset(likely | set(_SCRIPT_NAMES.values()) | set(_READ_AS))


def _without_legacy(subtags: list[str]) -> list[str]:
    """Replace a registered legacy prefix: ``i-lux``, ``no-bok``, ``zh-min-nan``, ``sgn-be-fr``."""
    for length in range(len(subtags), 1, -1):
        found = _facts().aliases.get("-".join(subtags[:length]))
        if found:
            return [*_public_subtags(found), *subtags[length:]]
    return subtags


def _public_subtags(replacement: str) -> list[str]:
    return replacement.lower().split("-x-")[0].split("-")


def _is_language_of(extended: str, prefix: str) -> bool:
    """Check whether a subtag is an extended language (``zh-yue``), not a three-letter country."""
    prefix = canonical_language(prefix, macro=False)
    if extended in _facts().extended.get(prefix, "").split():
        return True
    members = {extended, canonical_language(extended, macro=False)} & set(members_of_macrolanguage(prefix))
    return bool(members) and not _is_region(extended)


def _is_region(subtag: str) -> bool:
    return bool(_REGION.fullmatch(subtag)) or (len(subtag) == 3 and subtag.upper() in _facts().regions)


def forms_of_tag(tag: Tag) -> Iterator[tuple[Tag, bool]]:
    """Yield the tag with its current region, then each of CLDR's replacements, step by step.

    Yields:
        A form, and whether it names the macrolanguage instead of the language: ``arb`` → ``ar``.
    """
    facts = _facts()
    form, macro = dataclasses.replace(tag, region=_region(tag)), False
    for variant in tag.variants:
        if found := facts.aliases.get(f"{tag.language}-{variant}"):
            form = _replaced(form, found)
    while True:
        yield form, macro
        found = facts.aliases.get(form.language)
        macro = macro or found is None
        found = found or facts.defaults.get(form.language)
        if found is None:
            return
        form = _replaced(form, found)


def _replaced(tag: Tag, replacement: str) -> Tag:
    """Return the replacement of a tag, keeping the tag's script, region and variants."""
    new = _tag_from_subtags(_public_subtags(replacement)) or Tag("und")
    return Tag(new.language, tag.script or new.script, tag.region or new.region, tag.variants)


def _region(tag: Tag) -> str:
    """Return the current region of a tag; of several replacements, the one likely for the language."""
    choices = _facts().regions.get(tag.region, tag.region).split(" ")
    _, _, home = _facts().likely.get(canonical_language(tag.language), "").partition("-")
    return home if home in choices else choices[0]


@lru_cache(maxsize=1024)
def canonical_language(language: str, *, macro: bool = True) -> str:
    """Return CLDR's code of a language: ``por`` → ``pt``, and with ``macro`` ``arb`` → ``ar``."""
    facts = _facts()
    while True:
        found = facts.aliases.get(language) or (macro and facts.defaults.get(language))
        if not found:
            return language
        language = found.split("-")[0]


def likely_script(language: str, region: str = "") -> str:
    """Return CLDR's likely script of a language, in a region if given; empty if the data has none."""
    likely = _facts().likely
    language = canonical_language(language)
    return (likely.get(f"{language}-{region}") or likely.get(language, "")).split("-")[0]


def readable_script(script: str, known: Mapping[str, str]) -> str | None:
    """Return the script in ``known`` that covers ``script``, such as ``Hang`` for ``Kore``."""
    return next((one for one in (script, _READ_AS.get(script)) if one is not None and one in known), None)


@lru_cache(maxsize=1024)
def macrolanguage_of(language: str) -> str | None:
    """Return CLDR's code of a language's macrolanguage, or of the language it was a variant of."""
    known = {language, canonical_language(language, macro=False)}
    for macro, members in _facts().macrolanguages.items():
        if known & set(members.split()):
            return macro
    variants = (code for code, new in _facts().aliases.items() if new in known and "-" in code)
    return next((code.split("-")[0] for code in variants), None)


def members_of_macrolanguage(language: str) -> tuple[str, ...]:
    """Return the member languages of a macrolanguage."""
    return tuple(_facts().macrolanguages.get(canonical_language(language, macro=False), "").split())


def official_languages(country: str) -> tuple[str, ...]:
    """Return the tags of a country's official languages, for country codes that are not language codes."""
    found = _facts().countries.get(country, "").split()
    return tuple(f"{language}-{country.upper()}" for language in found)


def is_assigned(language: str) -> bool:
    """Check whether a code of two or three letters is assigned in ISO 639."""
    facts = _facts()
    return (language[2:] or "-") in facts.assigned.get(language[:2], "") or language in facts.aliases
