"""Build ``runtime/preprocessing/language_tags.json`` from CLDR and IANA data in npm packages.

    python -m samples.languages [--npm-folder FOLDER]

Only entries relevant to rows of ``runtime/preprocessing/languages.csv`` are kept; run it again when a row is
added.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from samples.build import LANGUAGES
from samples.sources import Package, Tarball

CLDR_CORE = Package("cldr-core", "48.2.0", "Unicode-3.0; © 2004–2026 Unicode, Inc.")
IANA_SUBTAGS = Package("language-subtag-registry", "0.4.2", "CC0-1.0")
N_OFFICIAL = 3
TAGS = LANGUAGES.with_name("language_tags.json")


def main() -> None:
    """Parse the command line and build the file."""
    parser = argparse.ArgumentParser(description="Build the file of language tags from npm packages.")
    parser.add_argument(
        "--npm-folder", type=Path, help="folder of npm tarballs; missing ones are downloaded into it"
    )
    parser.add_argument("--out", type=Path, default=TAGS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        facts = facts_from_packages(arguments.npm_folder or Path(scratch))
    part = arguments.out.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=0, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    part.rename(arguments.out)
    print(f"{', '.join(f'{len(part)} {name}' for name, part in facts.items())} → {arguments.out}")


def facts_from_packages(npm_folder: Path) -> dict[str, Any]:
    """Collect aliases, likely scripts, macrolanguages, country codes, assigned codes and registered subtags.

    - ``sources``: the packages, their versions and licences
    - ``aliases``: code → CLDR's code of the same language; ``no-bok`` → ``nb``, ``por`` → ``pt``
    - ``defaults``: individual language → the macrolanguage that CLDR uses for it; ``arb`` → ``ar``
    - ``regions``: region → the regions that replace it; ``TWN`` → ``TW``, ``YU`` → ``RS ME``
    - ``likely``: language → ``Script-REGION``, language and region → another script; ``uz-AF`` → ``Arab``
    - ``extended``: language → the extended language subtags that IANA registered after it; ``zh`` → ``yue``
    - ``macrolanguages``: macrolanguage → its individual languages
    - ``countries``: country code that is not a language code → official languages
    - ``assigned``: the first two letters of language codes → their third letters, or ``-`` for none
    - ``registered``: ``regions``, every region subtag, private ones included
    - ``variants``: variant subtag → the languages that it was registered for; ``ao1990`` → ``gl pt``
    """
    cldr, registry = Tarball(CLDR_CORE, npm_folder), Tarball(IANA_SUBTAGS, npm_folder)
    metadata = cldr.json("supplemental/aliases.json")["supplemental"]["metadata"]["alias"]
    likely = cldr.json("supplemental/likelySubtags.json")["supplemental"]["likelySubtags"]
    territories = cldr.json("supplemental/territoryInfo.json")["supplemental"]["territoryInfo"]
    subtags = registry.json("data/json/registry.json")
    aliases, defaults = aliases_by_kind(metadata["languageAlias"])
    ours = {canonical_language(code, {**aliases, **defaults}) for code in languages_of_table()}
    assigned = [one["Subtag"] for one in subtags if one["Type"] == "language" and ".." not in one["Subtag"]]
    return {
        "sources": {f"{p.name} {p.version}": p.licence for p in (CLDR_CORE, IANA_SUBTAGS)},
        "aliases": aliases,
        "defaults": defaults,
        "regions": {old: new["_replacement"] for old, new in metadata["territoryAlias"].items()},
        "likely": likely_scripts(likely, ours),
        "extended": extended_languages(subtags),
        "macrolanguages": macrolanguages(subtags, ours, {**aliases, **defaults}),
        "countries": official_languages(territories, ours, set(assigned)),
        "assigned": by_first_letters(assigned),
        "registered": {"regions": " ".join(registered_regions(subtags))},
        "variants": languages_of_variants(subtags),
    }


def languages_of_table() -> set[str]:
    """Return the language subtags of all spellings in the runtime's table."""
    with LANGUAGES.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    spellings = [spelling for row in rows for spelling in (row["bcp47"], *row["aliases"].split())]
    return {spelling.split("-")[0] for spelling in [*spellings, *(row["flores"][:3] for row in rows)]}


def aliases_by_kind(found: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], dict[str, str]]:
    """Split CLDR's language aliases, in lower case, into same-language and macrolanguage aliases."""
    aliases: dict[str, str] = {}
    defaults: dict[str, str] = {}
    for code, alias in found.items():
        if not code.startswith("und-"):
            kind = defaults if alias["_reason"] == "macrolanguage" else aliases
            kind[code.lower()] = alias["_replacement"]
    return aliases, defaults


def canonical_language(code: str, aliases: Mapping[str, str]) -> str:
    """Return the language subtag that CLDR uses for a code."""
    while code in aliases:
        code = aliases[code].split("-")[0]
    return code


def likely_scripts(likely: Mapping[str, str], ours: set[str]) -> dict[str, str]:
    """Return the likely script and region of our languages, and the script of each region if different."""
    found = {}
    for tag, maximal in likely.items():
        language, _, region = tag.partition("-")
        if language in ours and len(region) != 4:
            found[tag] = maximal.split("-")[1] if region else maximal.partition("-")[2]
    return found


def extended_languages(subtags: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the extended language subtags by prefix."""
    found: dict[str, list[str]] = {}
    for one in subtags:
        if one["Type"] == "extlang":
            found.setdefault(one["Prefix"][0], []).append(one["Subtag"])
    return {prefix: " ".join(sorted(codes)) for prefix, codes in found.items()}


def macrolanguages(
    subtags: Iterable[Mapping[str, Any]], ours: set[str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Return the macrolanguages that include one of our languages, with the codes of their languages."""
    members: dict[str, set[str]] = {}
    for one in subtags:
        if one["Type"] == "language" and "Macrolanguage" in one:
            members.setdefault(one["Macrolanguage"], set()).add(one["Subtag"])
    return {
        macro: " ".join(sorted(codes))
        for macro, codes in members.items()
        if macro in ours or any(canonical_language(code, aliases) in ours for code in codes)
    }


def official_languages(territories: Mapping[str, Any], ours: set[str], assigned: set[str]) -> dict[str, str]:
    """Map country codes that are not language codes to our official languages there, largest first."""
    found = {}
    for region, facts in territories.items():
        spoken = {
            code.split("_")[0]: float(one["_populationPercent"])
            for code, one in facts.get("languagePopulation", {}).items()
            if one.get("_officialStatus") in ("official", "de_facto_official")
        }
        known = sorted(ours & spoken.keys(), key=lambda code: (-spoken[code], code))
        if known and region.lower() not in assigned:
            found[region.lower()] = " ".join(known[:N_OFFICIAL])
    return found


def registered_regions(subtags: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the region subtags of the registry, its ranges of private ones (``XA..XZ``) written out."""
    found = []
    for one in (one["Subtag"] for one in subtags if one["Type"] == "region"):
        first, _, last = one.partition("..")
        found += (
            [first[0] + chr(code) for code in range(ord(first[1]), ord(last[1]) + 1)] if last else [first]
        )
    return sorted(found)


def languages_of_variants(subtags: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the languages that each variant subtag was registered for; empty for any language."""
    variants = {one["Subtag"]: one.get("Prefix", ()) for one in subtags if one["Type"] == "variant"}
    return {
        variant: " ".join(sorted({prefix.split("-")[0] for prefix in prefixes}))
        for variant, prefixes in variants.items()
    }


def by_first_letters(codes: Iterable[str]) -> dict[str, str]:
    """Pack codes of two and three letters, keyed by their first two letters."""
    found: dict[str, str] = {}
    for code in sorted(codes):
        if len(code) <= 3:
            found[code[:2]] = found.get(code[:2], "") + (code[2:] or "-")
    return found


if __name__ == "__main__":
    main()
