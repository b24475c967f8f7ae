"""Openly licensed drawings for training only, downloaded from npm at training time and never committed.

Each is rasterised as it was drawn and, where it is a vector drawing, in several other styles (see
``samples.restyling``). Licences are in ``samples/LICENSES/NOTICE.md``.
"""

from __future__ import annotations

import io
import json
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image, ImageDraw, ImageFont

from samples.restyling import restyled
from samples.sources import Emoji, Package, Tarball, on_white

SIDE = 64
N_RESTYLED = 4
ICON_NAMES = Path(__file__).with_name("icon_names.json")
OTHER_NAMES: Mapping[str, Sequence[str]] = json.loads(ICON_NAMES.read_text(encoding="utf-8"))
"""Icon names by ``Emoji.key`` that follow from no name of the emoji: misspelt, older, or a vendor's own."""

REGIONAL_INDICATORS = {0x1F1E6 + position: ord("a") + position for position in range(26)}
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT")
FLUENT_3D = Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT")
NOTO_SVG = Package("@iconify-json/noto", "1.2.9", "Apache-2.0")
NOTO_FONT = Package("@expo-google-fonts/noto-emoji", "0.4.7", "OFL-1.1 (font), MIT (package)")


@dataclass(frozen=True, slots=True)
class Vendor:
    """Set of vector drawings in an Iconify package.

    Attributes:
        name: Name under which its drawings are weighted.
        design: Sets of one design are held out together.
        package: Npm package.
        flags_as: Name of a country's flag, with ``{}`` for its two letters, in a package of flags alone.
        n_restyled: Number of other styles that each drawing is rasterised in.
    """

    name: str
    design: str
    package: Package
    flags_as: str | None = None
    n_restyled: int = N_RESTYLED


VENDORS = (
    Vendor("noto", "noto", NOTO_SVG),
    Vendor("noto-v1", "noto-v1", Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0")),
    Vendor("fluent-flat", "fluent", FLUENT_FLAT),
    Vendor("fluent-colour", "fluent", Package("@iconify-json/fluent-emoji", "1.2.7", "MIT")),
    Vendor(
        "fluent-lines",
        "fluent",
        Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
        n_restyled=0,
    ),
    Vendor("emojione", "emojione", Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0")),
    Vendor(
        "emojione-lines",
        "emojione",
        Package("@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0"),
        n_restyled=0,
    ),
    Vendor("fxemoji", "fxemoji", Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0")),
    Vendor("streamline", "streamline", Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0")),
    Vendor("flag-icons", "flag-icons", Package("@iconify-json/flag", "1.2.12", "MIT"), "{}-4x3", 2),
    Vendor("flagpack", "flagpack", Package("@iconify-json/flagpack", "1.2.8", "MIT"), "{}", 2),
    Vendor("circle-flags", "circle-flags", Package("@iconify-json/circle-flags", "1.2.11", "MIT"), "{}", 2),
)
DESIGNS = {vendor.name: vendor.design for vendor in VENDORS} | {
    "fluent-3d": "fluent",
    "noto-lines": "noto-lines",
}
"""Design by the name of a set of drawings."""


PACKAGES = (*(vendor.package for vendor in VENDORS), FLUENT_3D, NOTO_FONT)
"""Packages of the training-only drawings; ``samples/provenance.json`` records their tarballs."""


@dataclass(frozen=True, slots=True)
class VendorDrawing:
    """Drawing of one emoji.

    Attributes:
        text: ``Emoji.text``.
        vendor: Key of ``DESIGNS``.
        is_restyled: False for the drawing as its vendor made it.
        image: RGB 64 × 64 on white.
    """

    text: str
    vendor: str
    is_restyled: bool
    image: Image.Image


@dataclass(frozen=True, slots=True)
class IconSet:
    """Iconify package: SVG bodies by icon name."""

    icons: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str]
    width: int
    height: int

    def icon(self, names: Iterator[str]) -> Mapping[str, Any] | None:
        """Return the first icon that exists by one of the names, an alias included."""
        found = (self.icons.get(self.aliases.get(name, name)) for name in names)
        return next((icon for icon in found if icon), None)

    def drawings(
        self, icon: Mapping[str, Any], n_restyled: int, draw: random.Random
    ) -> Iterator[Image.Image]:
        """Rasterise an icon on white, centred in a square: as it is, then in other styles."""
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        side = max(width, height)
        left, top = (width - side) / 2 + icon.get("left", 0), (height - side) / 2 + icon.get("top", 0)
        box = f'viewBox="{left} {top} {side} {side}" width="{SIDE}" height="{SIDE}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>'
        body = icon["body"]
        for one in (body, *(restyled(body, side, draw) for _ in range(n_restyled))):
            yield on_white(bytes(resvg_py.svg_to_bytes(svg_string=f"{svg}{one}</svg>")))


def icon_set(package: Package, folder: Path) -> IconSet:
    """Read the icons of an Iconify package; aliases that mirror or turn an icon are left out."""
    content = Tarball(package, folder).json("icons.json")
    aliases = {
        name: alias["parent"]
        for name, alias in content.get("aliases", {}).items()
        if set(alias) == {"parent"}
    }
    return IconSet(content["icons"], aliases, content.get("width", 16), content.get("height", 16))


def extra_drawings(
    emoji: Sequence[Emoji], english: Mapping[str, str], folder: Path, *, seed: int
) -> Iterator[VendorDrawing]:
    """Yield every drawing of every training-only vendor.

    Args:
        emoji: Emoji to draw.
        english: English name by ``Emoji.key``, from which most packages derive their icon names.
        folder: Folder of the npm tarballs.
        seed: Seed of the other styles.
    """
    for vendor in VENDORS:
        yield from _vectors(vendor, emoji, english, folder, random.Random(f"{seed} {vendor.name}"))
    yield from _fluent_3d(emoji, folder)
    yield from _noto_lines(emoji, folder)


def _vectors(
    vendor: Vendor, emoji: Sequence[Emoji], english: Mapping[str, str], folder: Path, draw: random.Random
) -> Iterator[VendorDrawing]:
    icons = icon_set(vendor.package, folder)
    by_key = _names_by_key(vendor.package, folder)
    for one in emoji:
        if vendor.flags_as:
            names = iter([vendor.flags_as.format(letters)] if (letters := _country(one)) else [])
        elif by_key:
            names = iter([by_key[one.key]] if one.key in by_key else [])
        else:
            names = _icon_names(one, english)
        if icon := icons.icon(names):
            for index, image in enumerate(icons.drawings(icon, vendor.n_restyled, draw)):
                yield VendorDrawing(one.text, vendor.name, index > 0, image)


def _names_by_key(package: Package, folder: Path) -> dict[str, str]:
    """Read a package's icon names by ``Emoji.key``; empty where it has no such table."""
    # The colour package repeats the flat one's names, but not their table.
    table = FLUENT_FLAT if package.name.endswith("/fluent-emoji") else package
    for _, content in Tarball(table, folder).files(r"chars\.json"):
        return {_key_from_code_points(points): name for points, name in json.loads(content).items()}
    return {}


def _fluent_3d(emoji: Sequence[Emoji], folder: Path) -> Iterator[VendorDrawing]:
    wanted = {one.key: one.text for one in emoji}
    for match, content in Tarball(FLUENT_3D, folder).files(r"assets/([0-9a-f-]+)\.webp"):
        if text := wanted.get(_key_from_code_points(match[1])):
            image = on_white(content).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            yield VendorDrawing(text, "fluent-3d", False, image)


def _noto_lines(emoji: Sequence[Emoji], folder: Path) -> Iterator[VendorDrawing]:
    """Draw the emoji of a font of one colour; it spells flags as letters, so they are left out."""
    for _, content in Tarball(NOTO_FONT, folder).files(r"(400Regular|700Bold)/.*\.ttf"):
        font = ImageFont.truetype(io.BytesIO(content), 4 * SIDE, layout_engine=ImageFont.Layout.RAQM)
        one_glyph = font.getlength("\U0001f600")
        for one in emoji:
            left, top, right, bottom = font.getbbox(one.text)
            if one.category == "Flags" or not 0 < font.getlength(one.text) <= 1.1 * one_glyph:
                continue
            side = round(max(right - left, bottom - top))
            large = Image.new("RGB", (side, side), "white")
            corner = ((side - right - left) / 2, (side - bottom - top) / 2)
            ImageDraw.Draw(large).text(corner, one.text, "black", font)
            yield VendorDrawing(
                one.text, "noto-lines", False, large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            )


def _key_from_code_points(code_points: str) -> str:
    return "".join(chr(int(point, 16)) for point in code_points.split("-")).replace("\ufe0f", "")


def _icon_names(one: Emoji, english: Mapping[str, str]) -> Iterator[str]:
    yield from OTHER_NAMES.get(one.key, ())
    slug = _slug(english[one.key])
    yield slug
    yield f"flag-for-{slug}"
    yield slug.replace("flag-", "flag-for-", 1)
    yield _slug(english[one.key].replace("&", "and")).replace("flag-", "flag-for-", 1)
    yield slug.replace("-", "")
    if len(one.key) == 1:
        yield _slug(unicodedata.name(one.key, "")).replace("-", "")
    for short in one.short_names:
        yield _slug(short)
        yield _slug(short).replace("-", "")
    yield f"{slug}-1"
    if slug.startswith("flag-"):
        yield slug.removeprefix("flag-")


def _slug(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", ascii_name.replace("'", "")).strip("-")


def _country(one: Emoji) -> str:
    """Return the two letters of a pair of regional indicators, or else an empty name."""
    letters = one.key.translate(REGIONAL_INDICATORS)
    return letters if len(letters) == 2 and letters.isascii() else ""
