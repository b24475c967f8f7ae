"""Openly licensed drawings for training only, downloaded from npm at training time and never committed.

Microsoft Fluent (flat, colour, 3D; MIT), EmojiOne 2 (CC-BY-4.0), FxEmojis (Apache-2.0) and flag-icons (MIT).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from samples.sources import Emoji, Package, Tarball, on_white

SIDE = 64
REGIONAL_INDICATORS = {0x1F1E6 + position: ord("a") + position for position in range(26)}
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT")
FLUENT_COLOUR = Package("@iconify-json/fluent-emoji", "1.2.7", "MIT")
FLUENT_3D = Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT")
EMOJIONE = Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0")
FXEMOJI = Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0")
FLAGS = Package("@iconify-json/flag", "1.2.12", "MIT")


@dataclass(frozen=True, slots=True)
class IconSet:
    """Iconify package: SVG bodies by icon name."""

    icons: Mapping[str, Mapping[str, Any]]
    width: int
    height: int

    def drawing(self, name: str) -> Image.Image:
        """Rasterise one icon on white, centred in a 64 × 64 square."""
        icon = self.icons[name]
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        side = max(width, height)
        left, top = (width - side) / 2 + icon.get("left", 0), (height - side) / 2 + icon.get("top", 0)
        box = f'viewBox="{left} {top} {side} {side}" width="{SIDE}" height="{SIDE}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>'
        return on_white(bytes(resvg_py.svg_to_bytes(svg_string=f"{svg}{icon['body']}</svg>")))


def icon_set(package: Package, folder: Path) -> IconSet:
    """Read the icons of an Iconify package."""
    content = Tarball(package, folder).json("icons.json")
    return IconSet(content["icons"], content.get("width", 16), content.get("height", 16))


def extra_drawings(
    emoji: list[Emoji], english: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, Image.Image]]:
    """Yield (``Emoji.text``, RGB 64 × 64 on white) for each drawing of every training-only vendor.

    Args:
        emoji: Emoji to draw.
        english: English name by ``Emoji.key``, from which two packages derive their icon names.
        folder: Folder of the npm tarballs.
    """
    fluent_names = _fluent_names(folder)
    for package in (FLUENT_FLAT, FLUENT_COLOUR):
        icons = icon_set(package, folder)
        for one in emoji:
            if (name := fluent_names.get(one.key, "")) in icons.icons:
                yield one.text, icons.drawing(name)
    yield from _fluent_3d(emoji, folder)
    for package in (EMOJIONE, FXEMOJI):
        icons = icon_set(package, folder)
        for one in emoji:
            found = next((name for name in _icon_names(one, english) if name in icons.icons), None)
            if found:
                yield one.text, icons.drawing(found)
    icons = icon_set(FLAGS, folder)
    for one in emoji:
        if (name := _flag_name(one)) in icons.icons:
            yield one.text, icons.drawing(name)


def _fluent_names(folder: Path) -> dict[str, str]:
    by_code_points = Tarball(FLUENT_FLAT, folder).json("chars.json")
    return {_key_from_code_points(points): name for points, name in by_code_points.items()}


def _fluent_3d(emoji: list[Emoji], folder: Path) -> Iterator[tuple[str, Image.Image]]:
    wanted = {one.key: one.text for one in emoji}
    for match, content in Tarball(FLUENT_3D, folder).files(r"assets/([0-9a-f-]+)\.webp"):
        if text := wanted.get(_key_from_code_points(match[1])):
            yield text, on_white(content).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _key_from_code_points(code_points: str) -> str:
    return "".join(chr(int(point, 16)) for point in code_points.split("-")).replace("\ufe0f", "")


def _icon_names(one: Emoji, english: Mapping[str, str]) -> Iterator[str]:
    slug = _slug(english[one.key])
    yield slug
    yield f"flag-for-{slug}"
    yield slug.replace("flag-", "flag-for-", 1)
    yield slug.replace("-", "")
    for short in one.short_names:
        yield _slug(short)
        yield _slug(short).replace("-", "")


def _slug(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", ascii_name.replace("'", "")).strip("-")


def _flag_name(one: Emoji) -> str:
    """Return ``xx-4x3`` for a pair of regional indicators, or else an empty name, which no icon has."""
    letters = one.key.translate(REGIONAL_INDICATORS)
    return f"{letters}-4x3" if len(letters) == 2 and letters.isascii() else ""
