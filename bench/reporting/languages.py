"""Figures of every language over all variants: table rows, and map tiles grouped by script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.preprocessing.languages import english_name

__all__ = ["LanguageRow", "Tile", "language_rows", "tiles_by_script"]

_DIRECTIONS = ("text_to_image", "image_to_text")
_SCRIPTS = {
    "Adlm": "Adlam",
    "Arab": "Arabic",
    "Armn": "Armenian",
    "Beng": "Bengali",
    "Cakm": "Chakma",
    "Cher": "Cherokee",
    "Cyrl": "Cyrillic",
    "Deva": "Devanagari",
    "Ethi": "Ethiopic",
    "Geor": "Georgian",
    "Grek": "Greek",
    "Gujr": "Gujarati",
    "Guru": "Gurmukhi",
    "Hang": "Hangul",
    "Hans": "Chinese, simplified",
    "Hant": "Chinese, traditional",
    "Hebr": "Hebrew",
    "Jpan": "Japanese",
    "Khmr": "Khmer",
    "Knda": "Kannada",
    "Laoo": "Lao",
    "Latn": "Latin",
    "Mlym": "Malayalam",
    "Mymr": "Myanmar",
    "Orya": "Odia",
    "Rohg": "Hanifi Rohingya",
    "Sinh": "Sinhala",
    "Syrc": "Syriac",
    "Taml": "Tamil",
    "Telu": "Telugu",
    "Tfng": "Tifinagh",
    "Thai": "Thai",
    "Tibt": "Tibetan",
}
"""Scripts of all known languages (ISO 15924)."""
_LEVELS = (0.25, 0.5, 1.0)
"""Points lost at which a tile takes the next colour."""


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """Figures of one language over all models, variants and directions of the precision records.

    Attributes:
        recall: PyTorch's R@1, text→image, mean over the models; percent.
        worst_drop: Largest loss of R@1 by a variant, in points.
        worst: Variant with that loss.
        mean_drop: Mean over variants below FP32, both directions.
        cosine: Lowest cosine of any text to PyTorch's.
        overlap: Lowest share of the top ten in common.
    """

    code: str
    name: str
    recall: float
    worst_drop: float
    worst: str
    mean_drop: float
    cosine: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Tile:
    """Language on the map; ``level`` from 0 (nothing lost) to 3."""

    code: str
    name: str
    level: int
    title: str


def language_rows(records: Sequence[Mapping[str, Any]]) -> list[LanguageRow]:
    """Return the rows by descending worst drop."""
    cells: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for record in records:
        for model, variants in record["retrieval"].items():
            for variant, engines in variants.items():
                for found in engines.values():
                    for code, entry in found["languages"].items():
                        cells.setdefault(code, []).append((model, variant, entry))
    rows = [_row(code, found) for code, found in cells.items()]
    return sorted(rows, key=lambda row: (-row.worst_drop, row.code))


def tiles_by_script(rows: Sequence[LanguageRow]) -> dict[str, list[Tile]]:
    """Return the map: scripts with several languages first, by their number."""
    scripts: dict[str, list[Tile]] = {}
    for row in sorted(rows, key=lambda row: row.name):
        script = row.code.rpartition("_")[2]
        level = sum(row.worst_drop > limit for limit in _LEVELS)
        title = f"{row.name}: {row.worst_drop:.2f} points lost at most, by {row.worst}"
        scripts.setdefault(script, []).append(Tile(row.code, row.name, level, title))
    several = {s: tiles for s, tiles in scripts.items() if len(tiles) > 1}
    lone = [tile for tiles in scripts.values() if len(tiles) == 1 for tile in tiles]
    ordered = dict(sorted(several.items(), key=lambda item: (-len(item[1]), item[0])))
    named = {_SCRIPTS.get(script, script): tiles for script, tiles in ordered.items()}
    return {**named, "Scripts of one language each": lone} if lone else named


def _row(code: str, found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> LanguageRow:
    drops = [
        (100 * (entry[side]["reference"]["1"] - entry[side]["exported"]["1"]), f"{model} {variant}, {side}")
        for model, variant, entry in found
        if variant != "fp32"
        for side in _DIRECTIONS
    ] or [(0.0, "fp32")]
    worst_drop, worst = max(drops)
    recalls = {model: 100 * entry["text_to_image"]["reference"]["1"] for model, _, entry in found}
    return LanguageRow(
        code=code,
        name=english_name(code),
        recall=sum(recalls.values()) / len(recalls),
        worst_drop=worst_drop,
        worst=worst.replace("_to_", "→"),
        mean_drop=sum(drop for drop, _ in drops) / len(drops),
        cosine=min(entry["cosine_min"] for _, _, entry in found),
        overlap=min(entry[side]["top10_overlap"] for _, _, entry in found for side in _DIRECTIONS),
    )
