"""Build ``export/vocabulary/characters.json``, the characters of each language, from CLDR's npm package.

    python -m samples.characters [--npm-folder FOLDER]

Only rows of ``runtime/preprocessing/languages.csv`` that CLDR has exemplar characters for are written; run it
again when a row is added.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from samples.build import LANGUAGES
from samples.sources import Package, Tarball

CLDR_MISC = Package("cldr-misc-full", "48.2.0", "Unicode-3.0; © 2004–2026 Unicode, Inc.")
CHARACTERS = Path(__file__).resolve().parent.parent / "export" / "vocabulary" / "characters.json"

_SETS = ("exemplarCharacters", "auxiliary")
_ITEM = re.compile(r"\\u\{([0-9A-Fa-f ]+)\}|\\u([0-9A-Fa-f]{4})|\\(.)|\{((?:\\.|[^}])*)\}|(.)", re.DOTALL)


def main() -> None:
    """Parse the command line and build the file."""
    parser = argparse.ArgumentParser(description="Build the file of languages' characters from CLDR.")
    parser.add_argument(
        "--npm-folder", type=Path, help="folder of npm tarballs; missing ones are downloaded into it"
    )
    parser.add_argument("--out", type=Path, default=CHARACTERS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        facts = characters_from_cldr(arguments.npm_folder or Path(scratch))
    part = arguments.out.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=0, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    part.rename(arguments.out)
    print(f"characters of {len(facts['characters'])} languages → {arguments.out}")


def characters_from_cldr(npm_folder: Path) -> dict[str, Any]:
    """Collect the letters and marks of CLDR's exemplar sets, main and auxiliary, by FLORES code.

    The sets are lower case; a code's string holds upper and title case too, in NFKC, sorted. Characters
    outside the letters and marks are left out, since they belong to no language.
    """
    tarball = Tarball(CLDR_MISC, npm_folder)
    sets = {
        match[1]: json.loads(content)["main"][match[1]]["characters"]
        for match, content in tarball.files(r"main/([^/]+)/characters\.json")
    }
    with LANGUAGES.open(encoding="utf-8", newline="") as table:
        rows = [(row["flores"], row["cldr"].replace("_", "-")) for row in csv.DictReader(table)]
    found = {
        flores: "".join(
            sorted(set(_letters(_members(" ".join(sets[locale].get(name, "") for name in _SETS)))))
        )
        for flores, locale in rows
        if locale in sets
    }
    return {
        "sources": {f"{CLDR_MISC.name} {CLDR_MISC.version}": CLDR_MISC.licence},
        "characters": {flores: characters for flores, characters in found.items() if characters},
    }


def _members(pattern: str) -> Iterator[str]:
    """Yield the strings of a UnicodeSet pattern of characters, ranges, escapes and {strings}."""
    previous, in_range = "", False
    for match in _ITEM.finditer(pattern):
        points, point, escaped, string, plain = match.groups()
        if plain is not None and (plain.isspace() or plain in "[]"):
            continue
        if plain == "-":
            in_range = True
            continue
        if points is not None or point is not None:
            text = "".join(chr(int(one, 16)) for one in (points or point).split())
        else:
            text = escaped or plain or re.sub(r"\\(.)", r"\1", string or "")
        if in_range:
            yield from (chr(code) for code in range(ord(previous) + 1, ord(text)))
        previous, in_range = text, False
        yield text


def _letters(members: Iterable[str]) -> Iterator[str]:
    for member in members:
        for form in (member, member.lower(), member.upper(), member.title()):
            for character in unicodedata.normalize("NFKC", form):
                if unicodedata.category(character)[0] in "LM":
                    yield character


if __name__ == "__main__":
    main()
