"""Language codes against CLDR: Babel's copy of its data, resolved by another implementation of UTS #35."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from babel.core import get_global
from babel.localedata import locale_identifiers
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import LanguageError
from runtime.preprocessing.languages import flores_from_code, languages

LIKELY = get_global("likely_subtags")
ALIASES = get_global("language_aliases")
REGIONS = get_global("territory_aliases")
SPOKEN = get_global("territory_languages")
SCRIPTS = sorted({tag.split("_")[1] for tag in LIKELY.values()} | {"Kore", "Hani", "Hanb", "Latf", "Aran"})
ROWS = {row.flores: row for row in languages()}
SPELLED = {
    spelling.replace("_", "-").lower(): row.flores
    for row in languages()
    for spelling in (row.flores, row.bcp47, *row.aliases)
}
WRITES = {"Jpan": {"Hani", "Hira", "Hrkt", "Kana"}, "Hang": {"Kore", "Jamo"}, "Hant": {"Hanb"}}
WRITES |= {"Arab": {"Aran"}, "Latn": {"Latf", "Latg"}, "Cyrl": {"Cyrs"}, "Syrc": {"Syre", "Syrj", "Syrn"}}
INDIVIDUAL = {"azj", "fuv", "khk", "kmr", "prs", "uzn", "zsm"}
"""Languages with a row whose macrolanguage has a row in another script: that is another language's."""


@dataclass(frozen=True)
class Maximal:
    language: str
    script: str
    region: str


def maximal(language: str, script: str = "", region: str = "") -> Maximal:
    """Aliases, then likely subtags, as UTS #35 has them."""
    region = region.upper()
    while language in ALIASES:
        language, *more = ALIASES[language].split("_")
        script = script or next((one for one in more if len(one) == 4), "")
        region = region or next((one for one in more if len(one) < 4), "")
    if region in REGIONS:
        home = LIKELY.get(language, "__").split("_")[2]
        region = home if home in REGIONS[region] else REGIONS[region][0]
    keys = [(language, script, region), (language, region), (language, script), (language,)]
    for key in ("_".join(part for part in parts if part) for parts in keys):
        if key in LIKELY:
            found = LIKELY[key].split("_")
            return Maximal(found[0], script or found[1], region or found[2])
    return Maximal(language, script, region)


def rows_by_own_language() -> dict[str, dict[str, str]]:
    """Language subtags as the table spells them and as CLDR has them → script → row, whatever the region."""
    found: dict[str, dict[str, str]] = {}
    for spelling, flores in SPELLED.items():
        language, *more = spelling.split("-")
        if not more or (len(more) == 1 and len(more[0]) == 4):
            found.setdefault(language, {})[more[0].title() if more else flores[4:]] = flores
    for language in [*found.keys() & ALIASES.keys()]:
        if "_" not in ALIASES[language]:
            found[ALIASES[language]] = {**found[language], **found.get(ALIASES[language], {})}
    return found


OWN = rows_by_own_language()


def row_with(rows: dict[str, str], script: str) -> str | None:
    scripts = [script, *(wider for wider, parts in WRITES.items() if script in parts)]
    return next((rows[one] for one in scripts if one in rows), None)


def expected(language: str, script: str = "", region: str = "") -> str | None:
    """The row that the table spells out, else the one of CLDR's language and script, if there is one."""
    asked = "-".join(part for part in (language, script, region) if part).lower()
    if asked in SPELLED:
        return SPELLED[asked]
    top = maximal(language, script, region)
    for one in (language,) if language in OWN else (top.language,):
        regional = SPELLED.get(f"{one}-{top.region}".lower()) if region else None
        if regional and (not script or row_with({regional[4:]: regional}, script)):
            return regional
    if not script and language in SPELLED and top.script == maximal(language).script:
        return SPELLED[language]
    same = {} if language in INDIVIDUAL else OWN.get(top.language, {})
    return row_with(OWN.get(language, {}), top.script) or row_with(same, top.script)


def resolved(code: str) -> str | None:
    try:
        return flores_from_code(code)
    except LanguageError:
        return None


def hints(code: str) -> tuple[str, ...]:
    with pytest.raises(LanguageError) as refused:
        flores_from_code(code)
    found = re.search(r"\(closest: ([^)]+)\)", str(refused.value))
    return tuple(found[1].split(", ")) if found else ()


def parts(locale: str) -> tuple[str, str, str]:
    language, *more = locale.split("_")
    script = next((one for one in more if len(one) == 4 and one.isalpha()), "")
    region = next((one for one in more if re.fullmatch("[A-Z]{2}|[0-9]{3}", one)), "")
    return language, script, region


LOCALES = sorted(locale_identifiers())
OURS = sorted(OWN)


def test_cldr_has_the_locales() -> None:
    assert len(LOCALES) > 1000
    assert len(SPOKEN) > 250


@pytest.mark.parametrize("language", sorted({locale.split("_")[0] for locale in LOCALES}))
def test_every_locale_is_what_likely_subtags_say(language: str) -> None:
    for locale in (one for one in LOCALES if one.split("_")[0] == language):
        want = expected(*parts(locale))
        assert resolved(locale) == want, locale
        assert resolved(f"{locale}.UTF-8") == want, locale
        assert resolved(locale.replace("_", "-") + "-u-nu-latn-x-mine") == want, locale


@pytest.mark.parametrize("region", sorted(SPOKEN))
def test_every_language_of_a_region_is_what_likely_subtags_say(region: str) -> None:
    tags = {(*parts(code)[:2], region) for code in SPOKEN[region] if code != "und"}
    wrong = {tag: resolved("-".join(filter(None, tag))) for tag in tags}
    assert {tag: found for tag, found in wrong.items() if found != expected(*tag)} == {}


def tags_of(language: str) -> Iterator[tuple[str, str, str]]:
    yield language, "", ""
    for region in SPOKEN:
        yield language, "", region
    for script in SCRIPTS:
        yield language, script, ""
    for script in ("Arab", "Cyrl", "Hans", "Hant", "Latn"):
        for region in ("CN", "IR", "RU", "TW", "US"):
            yield language, script, region


@pytest.mark.parametrize("language", OURS)
def test_every_code_with_and_without_script_and_region(language: str) -> None:
    found = {tag: (resolved("-".join(filter(None, tag))), expected(*tag)) for tag in tags_of(language)}
    assert {tag: both for tag, both in found.items() if both[0] != both[1]} == {}


@pytest.mark.parametrize("region", sorted(REGIONS))
def test_a_region_by_number_by_three_letters_or_by_an_old_name(region: str) -> None:
    languages_that_a_region_tells_apart = ("az", "fa", "kk", "ku", "sr", "uz", "yue")
    for language in languages_that_a_region_tells_apart:
        assert resolved(f"{language}-{region}") == expected(language, "", region)


@pytest.mark.parametrize("language", OURS)
def test_a_script_that_a_language_lacks_is_refused_with_the_scripts_that_it_has(language: str) -> None:
    own = {*OWN[language].values(), *OWN.get(maximal(language).language, {}).values()}
    for script in ("Cher", "Goth", "Hani", "Mong", "Shaw"):
        if expected(language, script) is None:
            named = hints(f"{language}-{script}")
            assert named
            assert set(named) <= own


def test_other_languages_of_cldr_are_hinted_at_by_their_macrolanguage_alone() -> None:
    others = {code for locale in LOCALES if resolved(code := locale.split("_")[0]) is None}
    assert len(others) > 80
    assert {code: named for code in sorted(others) if (named := hints(code))} == {
        "bal": ("bgn_Arab",),
        "sdh": ("kmr_Latn", "ckb_Arab"),
        "skr": ("pan_Arab",),
        "xnr": ("doi_Deva",),
    }


REGIONAL = sorted({row.bcp47 for row in languages()} | {"zh-TW", "sr-ME", "uz-AF", "pt-BR", "ku-IQ", "mn-CN"})
VARIANTS = st.sampled_from(["fonipa", "fonupa", "simple"]) | st.from_regex(
    r"[a-z]{4}[0-9]{4}", fullmatch=True
)
"""Variants registered for every language, and Glottocodes."""
EXTENSIONS = st.from_regex(
    r"[a-tv-wy-z](-[a-z0-9]{2,8}){1,3}|u-ca-[a-z]{3,8}|t-[a-z]{2}-m0-[a-z]{3,8}", fullmatch=True
)
PRIVATE = st.from_regex(r"x(-[a-z0-9]{1,8}){1,3}", fullmatch=True)


@given(
    st.sampled_from(REGIONAL),
    st.lists(VARIANTS, max_size=2),
    st.lists(EXTENSIONS, max_size=2),
    st.lists(PRIVATE, max_size=1),
)
def test_variants_extensions_and_private_use_change_nothing(tag, variants, extensions, private):
    assert resolved("-".join([tag, *variants, *extensions, *private])) == resolved(tag)


@given(st.sampled_from([*REGIONAL, *ROWS, *LOCALES]), st.randoms())
def test_case_and_separators_change_nothing(code, random):
    written = "".join(
        random.choice("-_") if one in "-_" else random.choice((one.lower(), one.upper())) for one in code
    )
    assert resolved(written) == resolved(code)


@given(st.sampled_from([*REGIONAL, *LOCALES, *OURS]))
def test_what_a_code_resolves_to_resolves_to_itself(code):
    found = resolved(code)
    assert found is None or (
        flores_from_code(found) == found and flores_from_code(ROWS[found].bcp47) == found
    )


@given(st.text(max_size=20) | st.from_regex(r"[a-zA-Z]{1,4}([-_.@#][a-zA-Z0-9]{0,9}){0,5}", fullmatch=True))
def test_any_text_is_a_row_or_a_refusal_that_names_rows(code):
    assert resolved(code) in ROWS or set(hints(code)) <= ROWS.keys()
